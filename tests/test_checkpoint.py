"""Checkpoints are whole or not there; damage is found; what was good stays good."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from phi3v import checkpoint
from phi3v.checkpoint import damage, load_checkpoint, newest_checkpoint, save_checkpoint, write_text, written_whole
from phi3v.errors import InputError

State = dict[str, Any]


def state_of(seed: int) -> State:
    """A small model that has taken two steps, one parameter frozen, one never reached."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for _ in range(2):
        step(**state)
    return state


def step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> float:
    loss = model[:3](torch.rand(5, 3)).square().sum()  # type: ignore[index]
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, State]:
    """A folder with the checkpoints of steps 1 and 2."""
    state = state_of(1)
    for number in (1, 2):
        save_checkpoint(tmp_path, number, **state)
    return tmp_path, state


def test_going_on_from_a_checkpoint_is_going_on(saved: tuple[Path, State]) -> None:
    folder, state = saved
    torch.manual_seed(7)
    save_checkpoint(folder, 3, **state)
    losses = [step(**state) for _ in range(3)]
    other = state_of(2)
    with torch.no_grad():
        other["model"][0].bias.copy_(state["model"][0].bias)  # what is frozen comes from the base checkpoint
    path, _ = newest_checkpoint(folder)
    assert path is not None
    assert load_checkpoint(path, **other) == 3
    assert [step(**other) for _ in range(3)] == losses
    assert all(torch.equal(a, b) for a, b in zip(state["model"].parameters(), other["model"].parameters(), strict=True))


def test_a_checkpoint_of_other_weights_is_refused_by_name(saved: tuple[Path, State]) -> None:
    folder, state = saved
    state["model"][2].bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"step-000002: other weights learn in this run, 2\.bias for one"):
        load_checkpoint(folder / "step-000002", **state)
    state["model"][2].bias.requires_grad_(True)
    state["model"][2].bias.data = torch.zeros(3)
    with pytest.raises(InputError, match=r"2\.bias has shape \[2\], expected \[3\]"):
        load_checkpoint(folder / "step-000002", **state)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = state_of(1)
    for number in (9, 10, 11, 100):
        save_checkpoint(tmp_path, number, **state, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000011", "step-000100"]


def test_what_only_looks_like_a_checkpoint_is_left_alone(saved: tuple[Path, State]) -> None:
    folder, state = saved
    (folder / "step-000002.backup").mkdir()
    save_checkpoint(folder, 3, **state, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002.backup", "step-000003"]


def truncate(path: Path) -> str:
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "weights.safetensors has"


def flip_a_bit(path: Path) -> str:
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "optimizer.safetensors is damaged: its SHA-256"


def remove_a_file(path: Path) -> str:
    (path / "random.safetensors").unlink()
    return "random.safetensors is missing"


def cut_the_manifest(path: Path) -> str:
    (path / "manifest.json").write_text('{"weights')
    return "manifest.json"


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, remove_a_file, cut_the_manifest])
def test_a_damaged_checkpoint_is_passed_over_by_name(harm: Any, saved: tuple[Path, State]) -> None:
    folder, _ = saved
    assert newest_checkpoint(folder) == (folder / "step-000002", [])
    said = harm(folder / "step-000002")
    path, complaints = newest_checkpoint(folder)
    assert path == folder / "step-000001"
    assert len(complaints) == 1
    assert said in complaints[0]
    assert str(folder / "step-000002") in complaints[0]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") == (None, [])


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_loses_nothing(
    error: Exception, saved: tuple[Path, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = saved
    write = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if path.name == "optimizer.safetensors":
            path.write_bytes(b"half of")
            raise error
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*step-000003: .*No space left") as caught:
        save_checkpoint(folder, 3, **state, keep=1)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
    assert damage(folder / "step-000001") is damage(folder / "step-000002") is None


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with written_whole(target) as folder:
        (folder / "a").write_text("1")

    def fail() -> Iterator[None]:
        with written_whole(target) as folder:
            (folder / "b").write_text("2")
            assert not (target / "b").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [file.name for file in tmp_path.rglob("*")] == ["final", "a"]
    with written_whole(target) as folder:
        (folder / "b").write_text("2")
    assert [file.name for file in tmp_path.rglob("*")] == ["final", "b"]


def test_a_killed_writer_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".final.unfinished").mkdir()
    (tmp_path / ".final.unfinished" / "half").write_text("")
    with written_whole(tmp_path / "final") as folder:
        (folder / "b").write_text("2")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["b", "final"]


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    write_text(file, "good")
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (_ for _ in ()).throw(FULL[0]))
    with pytest.raises(InputError, match=r"cannot write .*metrics\.json: .*No space left"):
        write_text(file, "better")
    assert file.read_text() == "good"
    assert list(tmp_path.iterdir()) == [file]
