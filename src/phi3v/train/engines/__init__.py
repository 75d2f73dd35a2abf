"""Many processes as one: who they are (`ranks`), and the engines that spread the work over them.

`Replicated` (one rank, or DDP), `Sharded` (FSDP2) and `Zero` (DeepSpeed) look alike from outside: `engine.Engine`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from phi3v.base.config import Optimizer
from phi3v.base.ranks import Ranks
from phi3v.train.adamw import weight_dtype
from phi3v.train.engines.engine import Engine

Parallel = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


def pick_engine(
    wanted: Parallel | Literal["auto"], ranks: Ranks, *, adapters: bool, optimizer: Optimizer = "adamw"
) -> tuple[Parallel, str]:
    """The engine for `--parallel`, and why, where that is worth saying.

    auto is the guide's choice: DDP for adapters, ZeRO-2 for the whole model, or FSDP2 where DeepSpeed is not installed;
    on CPUs always DDP, and for optimizers that only DDP knows.
    """
    if ranks.num == 1:
        return "ddp", "" if wanted in ("auto", "ddp") else f"one process: there is nothing for {wanted} to share out"
    if wanted != "auto":
        return wanted, ""
    if adapters or ranks.device.type == "cpu":
        return "ddp", ""
    if optimizer != "adamw":
        return "ddp", f"--optimizer {optimizer} is not split over the processes: ddp"
    if importlib.util.find_spec("deepspeed") is not None:
        return "zero2", ""
    return "fsdp2", "DeepSpeed is not installed, so fsdp2 instead of zero2 (pip install 'phi3v[deepspeed]')"


def build_engine(
    name: Parallel,
    model: Any,
    ranks: Ranks,
    *,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    max_grad_norm: float,
    dtype: torch.dtype,
    optimizer: Optimizer = "adamw",
) -> Engine:
    """Puts a model that has just been loaded into an engine: on its device, in its precision, with an optimizer.

    `optimizer` is the kind that `make_optimizer` makes; those that are not "adamw" only ddp takes.
    """
    from phi3v.train.engines.fsdp2 import Sharded
    from phi3v.train.engines.replicated import Replicated
    from phi3v.train.engines.zero import Zero

    if name == "ddp":
        return Replicated(
            model,
            ranks,
            make_optimizer=make_optimizer,
            max_grad_norm=max_grad_norm,
            dtype=dtype,
            learning=weight_dtype(optimizer),
        )
    assert optimizer == "adamw", f"{name} with {optimizer}"
    if name == "fsdp2":
        return Sharded(model, ranks, make_optimizer=make_optimizer, max_grad_norm=max_grad_norm, dtype=dtype)
    stage = int(name.removeprefix("zero"))
    return Zero(model, ranks, stage=stage, make_optimizer=make_optimizer, max_grad_norm=max_grad_norm, dtype=dtype)
