"""Checkpoints are whole or not there; damage is found; what was good stays good."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from phi3v.base.errors import InputError
from phi3v.base.ranks import Ranks
from phi3v.train import checkpoint
from phi3v.train.adamw import AdamW8bit, AdamWBf16, weight_dtype
from phi3v.train.checkpoint import damage, load_checkpoint, newest_checkpoint, save_checkpoint
from phi3v.train.engines import EngineSettings
from phi3v.train.engines.replicated import Replicated

State = dict[str, Any]
PART = "rank-00000-of-00001.safetensors"


def state_of(seed: int, kind: str = "adamw") -> State:
    """An engine with a small model that has taken two steps, one parameter frozen, the last layer never reached."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    settings = EngineSettings(
        make_optimizer=lambda model: optimizer_of([p for p in model.parameters() if p.requires_grad], kind),
        dtype=weight_dtype(kind),
        learning=weight_dtype(kind),
    )
    engine = Replicated(model, Ranks(device=torch.device("cpu")), settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda step: 1 / (step + 1))
    for number in range(2):
        step(engine, schedule, seed=number)
    return {"engine": engine, "schedule": schedule}


def optimizer_of(parameters: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=0.1, fused=True)
    groups = [{"params": parameters, "lr": 0.1, "weight_decay": 0.01}]
    if kind == "adamw-bf16":
        return AdamWBf16(groups, betas=(0.9, 0.99), eps=1e-8, seed=7)
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    return AdamW8bit(groups, betas=(0.9, 0.99), eps=1e-8)


def step(engine: Replicated, schedule: Any, *, seed: int, layers: int = 3) -> float:
    """The loss before it. Only four layers reach the last one."""
    torch.manual_seed(seed)
    inputs = torch.rand(5, 3).to(engine.model[0].weight.dtype)
    loss = engine.model[:layers](inputs).float().square().sum()
    loss.backward()
    engine.step()
    schedule.step()
    return loss.item()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, State]:
    """A folder with the checkpoints of steps 1 and 2."""
    state = state_of(1)
    for number in (1, 2):
        save_checkpoint(tmp_path, number, **state)
    return tmp_path, state


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit", "adamw-bf16"])
@pytest.mark.parametrize("layers", [3, 4], ids=["asleep", "awake afterwards"])
def test_going_on_from_a_checkpoint_is_going_on(layers: int, kind: str, tmp_path: Path, monkeypatch) -> None:
    """Weights, moments and schedule, bit for bit; also those of a layer that has slept so far."""
    monkeypatch.setattr("phi3v.train.adamw.MIN_8BIT", 4)  # not a bias of two
    folder, state = tmp_path, state_of(1, kind)
    save_checkpoint(folder, 3, **state)
    losses = [step(**state, seed=number, layers=layers) for number in range(3)]
    other = state_of(2, kind)
    with torch.no_grad():
        other["engine"].model[0].bias.copy_(state["engine"].model[0].bias)  # frozen: it comes with the base checkpoint
    path, _ = newest_checkpoint(folder)
    assert path is not None
    assert load_checkpoint(path, **other) == 3
    assert [step(**other, seed=number, layers=layers) for number in range(3)] == losses
    pairs = zip(state["engine"].model.parameters(), other["engine"].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert load_checkpoint(path, **state) == 3, "and back, from where it has got to"
    assert [step(**state, seed=number, layers=layers) for number in range(3)] == losses


def test_tensors_are_safetensors_and_the_rest_is_json(saved: tuple[Path, State]) -> None:
    """Every trained weight with its moments; nothing of what is frozen, nothing pickled, nothing random."""
    folder, state = saved
    path = folder / "step-000002"
    assert {file.name for file in path.iterdir()} == {PART, "state.json", "manifest.json"}
    learns = {name for name, p in state["engine"].model.named_parameters() if p.requires_grad}
    moments = {f"{kind}/{name}" for name in learns if name[0] != "3" for kind in ("exp_avg", "exp_avg_sq")}
    assert load_file(path / PART).keys() == {f"weight/{name}" for name in learns} | moments
    rest = json.loads((path / "state.json").read_text())
    assert rest.keys() == {"step", "metric", "schedule", "scaler"}
    assert json.loads((path / "manifest.json").read_text()).keys() == {PART, "state.json"}


def test_what_low_memory_optimizers_save(tmp_path: Path, monkeypatch) -> None:
    """Codes with their scales where moments are in eight bits; nothing wider than bf16 where all are bf16."""
    monkeypatch.setattr("phi3v.train.adamw.MIN_8BIT", 4)
    found = {}
    for number, kind in enumerate(("adamw-8bit", "adamw-bf16")):
        path = save_checkpoint(tmp_path, number, **state_of(1, kind))
        found[kind] = {name: tensor.dtype for name, tensor in load_file(path / PART).items()}
    assert set(found["adamw-bf16"].values()) == {torch.bfloat16}
    eight = {name.partition("/")[0]: dtype for name, dtype in found["adamw-8bit"].items() if name.endswith("2.weight")}
    assert eight == {
        "weight": torch.float32,
        **dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.uint8),
        **dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), torch.float32),
    }


def test_a_checkpoint_of_other_weights_is_refused_by_name(saved: tuple[Path, State]) -> None:
    folder, state = saved
    bias = state["engine"].model[2].bias
    bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"step-000002: other weights learn in this run, such as 2\.bias"):
        load_checkpoint(folder / "step-000002", **state)
    bias.requires_grad_(True)
    bias.data, bias.grad = torch.zeros(3), None
    state["engine"].optimizer.state.clear()
    with pytest.raises(InputError, match=r"2\.bias has shape \[2\], expected \[3\]"):
        load_checkpoint(folder / "step-000002", **state)


# -- which are kept --------------------------------------------------------------------------------------------------


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = state_of(1)
    for number in (9, 10, 11, 100):
        save_checkpoint(tmp_path, number, **state, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000011", "step-000100"]


def test_the_best_is_kept_besides_them(tmp_path: Path) -> None:
    """0.5 is best until 0.7 comes; a checkpoint without a score never is; the first of equals stays."""
    state, kept = state_of(1), []
    for number, metric in enumerate([0.5, None, 0.4, 0.7, 0.1, 0.7, None], start=1):
        save_checkpoint(tmp_path, number, **state, keep=1, metric=metric)
        kept.append(sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()))
    assert kept == [[1], [1, 2], [1, 3], [4], [4, 5], [4, 6], [4, 7]]


def test_what_only_looks_like_a_checkpoint_is_left_alone(saved: tuple[Path, State]) -> None:
    folder, state = saved
    (folder / "step-000002.backup").mkdir()
    save_checkpoint(folder, 3, **state, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002.backup", "step-000003"]


# -- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> str:
    file = path / PART
    file.write_bytes(file.read_bytes()[:-1])
    return f"{PART} is damaged: its size or SHA-256"


def flip_a_bit(path: Path) -> str:
    file = path / PART
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return f"{PART} is damaged: its size or SHA-256"


def remove_a_file(path: Path) -> str:
    (path / "state.json").unlink()
    return "state.json: No such file or directory"


def cut_the_manifest(path: Path) -> str:
    (path / "manifest.json").write_text('{"rank')
    return "manifest.json: not JSON"


HARMS = [truncate, flip_a_bit, remove_a_file, cut_the_manifest]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_damaged_checkpoint_is_passed_over_by_name(harm: Any, saved: tuple[Path, State]) -> None:
    folder, _ = saved
    assert newest_checkpoint(folder) == (folder / "step-000002", [])
    said = harm(folder / "step-000002")
    path, complaints = newest_checkpoint(folder)
    assert path == folder / "step-000001"
    assert len(complaints) == 1
    assert said in complaints[0]
    assert str(folder / "step-000002") in complaints[0]


@pytest.mark.parametrize("name", [PART, "state.json", "manifest.json"])
def test_no_flipped_bit_goes_unnoticed(name: str, saved: tuple[Path, State]) -> None:
    path = saved[0] / "step-000002"
    whole = (path / name).read_bytes()
    for position in range(0, len(whole), 3):
        harmed = bytearray(whole)
        harmed[position] ^= 1 << position % 8
        (path / name).write_bytes(harmed)
        assert damage(path) is not None, f"byte {position}"
    (path / name).write_bytes(whole)
    assert damage(path) is None


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") == (None, [])


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_loses_nothing(
    error: Exception, saved: tuple[Path, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = saved

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half of")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*step-000003: .*No space left") as caught:
        save_checkpoint(folder, 3, **state, keep=1)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
    assert damage(folder / "step-000001") is damage(folder / "step-000002") is None


def test_a_full_disk_at_the_very_end_loses_nothing_either(
    saved: tuple[Path, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the manifest is written, when all parts are there already."""
    folder, state = saved
    write = Path.write_text

    def full(file: Path, text: str) -> int:
        if file.name == "manifest.json":
            raise FULL[0]
        return write(file, text)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot write .*step-000003: .*No space left"):
        save_checkpoint(folder, 3, **state, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
