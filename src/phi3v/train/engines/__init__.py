"""Engines spread the work of training over the ranks.

`Replicated` (one rank, or DDP), `Sharded` (FSDP2) and `Zero` (DeepSpeed) have one interface: `engine.Engine`.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from phi3v.base.config import Optimizer
from phi3v.base.ranks import Ranks
from phi3v.train.engines.engine import Engine, EngineSettings

Parallel = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


def pick_engine(
    wanted: Parallel | Literal["auto"], ranks: Ranks, *, adapters: bool, optimizer: Optimizer = "adamw"
) -> tuple[Parallel, str]:
    """The engine for `--parallel`, and the reason where it is not the expected one, else "".

    auto: as in the guide DDP for adapters and ZeRO-2 for the whole model, or FSDP2 where DeepSpeed is not installed;
    DDP on CPUs, and for optimizers that only DDP supports.
    """
    if ranks.num == 1:
        return "ddp", "" if wanted in ("auto", "ddp") else f"one process: there is nothing for {wanted} to split"
    if wanted != "auto":
        return wanted, ""
    if adapters or ranks.device.type == "cpu":
        return "ddp", ""
    if optimizer != "adamw":
        return "ddp", f"--optimizer {optimizer} is not split over the processes: ddp"
    if importlib.util.find_spec("deepspeed") is not None:
        return "zero2", ""
    return "fsdp2", "DeepSpeed is not installed, so fsdp2 instead of zero2 (pip install 'phi3v[deepspeed]')"


def build_engine(name: Parallel, model: Any, ranks: Ranks, settings: EngineSettings) -> Engine:
    """Puts a model that has just been loaded into an engine: on its device, in its precision, with an optimizer."""
    if name == "ddp":
        from phi3v.train.engines.replicated import Replicated

        return Replicated(model, ranks, settings)
    if name == "fsdp2":
        from phi3v.train.engines.fsdp2 import Sharded

        return Sharded(model, ranks, settings)
    from phi3v.train.engines.zero import Zero

    return Zero(model, ranks, settings, stage=int(name.removeprefix("zero")))
