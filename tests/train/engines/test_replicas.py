"""Replicas that learn with a low-memory optimizer stay equal, bit for bit; and which engine such a run gets."""

from __future__ import annotations

import importlib.util
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from phi3v.base.config import Optim
from phi3v.base.ranks import Ranks
from phi3v.packing.loss import weighted_cross_entropy
from phi3v.train.adamw import weight_dtype
from phi3v.train.engines import EngineSettings, pick_engine
from phi3v.train.engines.replicated import Replicated
from phi3v.train.optim import build_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Network(nn.Module):
    """Learns from a pack, as the model does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SimpleNamespace()
        self.first, self.second = nn.Linear(32, 160), nn.Linear(160, 16)

    def forward(self, pack: Any, learn: bool = True) -> Any:
        logits = self.second(self.first(pack.inputs).tanh()).float()
        return SimpleNamespace(logits=logits, loss=weighted_cross_entropy(logits, pack.targets, pack.loss_weights))


def engine_for(kind: Any, ranks: Ranks, **optim: Any) -> Replicated:
    torch.manual_seed(0)
    settings = EngineSettings(
        make_optimizer=lambda model: build_optimizer(model, Optim(optimizer=kind, **optim), seed=1),
        dtype=weight_dtype(kind),
        learning=weight_dtype(kind),
    )
    return Replicated(Network(), ranks, settings)


def random_pack() -> Any:
    targets = torch.randint(16, (8,))
    return SimpleNamespace(inputs=torch.randn(8, 32), targets=targets, loss_weights=torch.full((8,), 1 / 32))


def learn(rank: int, kind: str, folder: Path) -> None:
    """Three steps of two packs of this rank's own; then its weights and moments are saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    engine = engine_for(kind, Ranks(rank=rank, num=2, device=CPU), learning_rate=1e-2)
    for step in range(3):
        torch.manual_seed(100 * step + rank)
        for last in (False, True):
            engine.learn(random_pack(), last=last)
        engine.step()
    kept: dict[str, Tensor] = {}
    for part in engine.slices():
        kept |= {f"{key}/{part.name}": value for key, value in {"weight": part.weight, **part.state}.items()}
        kept |= {f"{key}/{part.name}": value for key, value in part.scales.items()}
    torch.save(kept, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["adamw-8bit", "adamw-bf16"])
def test_replicas_stay_equal(kind: str, tmp_path: Path) -> None:
    if kind == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    context = multiprocessing.get_context("spawn")  # a forked process may hang in the thread pool of its parent
    processes = [context.Process(target=learn, args=(rank, kind, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = {part.name: part.weight for part in engine_for(kind, Ranks(device=CPU)).slices()}
    assert not any(torch.equal(one[f"weight/{name}"], start[name]) for name in start)


def test_the_norm_of_gradients_in_bf16_is_a_float32() -> None:
    engine = engine_for("adamw-bf16", Ranks(device=CPU))
    torch.manual_seed(0)
    engine.learn(random_pack(), last=True)
    gradients = [gradient.double() for _, gradient in engine.gradients() if gradient is not None]
    expected = torch.stack([gradient.norm() for gradient in gradients]).norm()
    norm, skipped, _ = engine.step()
    assert norm == pytest.approx(float(expected), rel=1e-6)
    assert not skipped


@pytest.mark.parametrize("kind", ["adamw-8bit", "adamw-bf16"])
def test_auto_is_ddp_for_what_cannot_be_split(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Ranks(num=2, device=GPU)
    note = f"--optimizer {kind} is not split over the processes: ddp"
    assert pick_engine("auto", two, adapters=False, optimizer=kind) == ("ddp", note)
    assert pick_engine("auto", two, adapters=True, optimizer=kind) == ("ddp", "")
    assert pick_engine("auto", Ranks(num=2, device=CPU), adapters=False, optimizer=kind) == ("ddp", "")
    assert pick_engine("auto", Ranks(device=GPU), adapters=False, optimizer=kind) == ("ddp", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert pick_engine("auto", two, adapters=False) == ("zero2", "")
