"""How a run is computed: what flags marked `auto` come to on this hardware, before anything large is loaded.

What cannot be computed here is refused by an error that names the flag.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.hardware import pick_dtype, why_not_compile
from phi3v.base.ranks import Ranks
from phi3v.model import fp8
from phi3v.model.backend import pick_attention
from phi3v.model.configuration import Phi3VConfig
from phi3v.train.build import build_model
from phi3v.train.engines import Parallel, pick_engine
from phi3v.train.feed import TrainingData
from phi3v.train.memory import MEMORY_TO_USE, STEPS_LOOKED_AT, estimate, largest_pack, layers_to_recompute


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a run is computed."""

    dtype: torch.dtype = torch.float32
    """Precision of the arithmetic."""
    attention: str = "sdpa"
    engine: Parallel = "ddp"
    engine_note: str = ""
    """Why this engine, where another one might be expected."""
    compiled: bool = False
    recompute: int = 0
    """Layers, of the decoder and then of CLIP, that are recomputed in the backward pass: see `pick_recompute`."""


def choose(run: Run, config: Phi3VConfig, ranks: Ranks) -> Choices:
    """Raises InputError, naming the flag, for what cannot be computed here."""
    dtype = pick_dtype(run.precision, ranks.device)
    attention = pick_attention(run.base.attention, ranks.device, dtype)
    if attention == "flex_attention" and config.attention_dropout:
        raise InputError(f"--attention flex_attention has no dropout, {run.base.model} asks for it: choose sdpa")
    if attention == "flex_attention" and ranks.device.type == "cpu":
        raise InputError("--attention flex_attention has no backward pass on a CPU: choose sdpa")
    engine, note = pick_engine(run.scaling.parallel, ranks, adapters=run.tuning.adapters, optimizer=run.optim.optimizer)
    splits = f"--parallel {engine} splits the weights" if engine != "ddp" else None
    if run.base.fp8 and (reason := splits or fp8.why_not(ranks.device, dtype)):
        raise InputError(f"--fp8: {reason}")
    dora = "PEFT's --dora cannot be compiled in one piece" if run.tuning.dora else None
    cannot_compile = dora or splits or why_not_compile(ranks.device)
    if run.base.compile == "on" and cannot_compile:
        raise InputError(f"--compile on: {cannot_compile}")
    by_itself = run.base.compile == "auto" and ranks.device.type == "cuda" and not cannot_compile
    return Choices(
        dtype=dtype,
        attention=attention,
        engine=engine,
        engine_note=note,
        compiled=run.base.compile == "on" or by_itself,
    )


def pick_recompute(run: Run, config: Phi3VConfig, data: TrainingData, ranks: Ranks, choices: Choices) -> int:
    """The number of layers to recompute for `--activation-checkpointing`; auto decides by the GPU's free memory."""
    every = config.num_hidden_layers + config.clip["num_hidden_layers"] - 1
    if run.tuning.activation_checkpointing != "auto" or ranks.device.type != "cuda":
        return every if run.tuning.activation_checkpointing == "full" else 0
    shell = build_model(run, choices.attention, choices.dtype, ranks, 0, shell=config)
    schedule = data.schedule(0)
    packs = [schedule.packs(step, ranks.num)[1] for step in range(min(len(schedule), STEPS_LOOKED_AT))]
    largest = largest_pack(data.lengths, packs)

    def needed(layers: int) -> float:
        return memory_of(run, shell, config, largest, ranks, replace(choices, recompute=layers))["total"]

    free = torch.cuda.mem_get_info(ranks.device)[0] / 1e9
    found = ranks.gather([layers_to_recompute(MEMORY_TO_USE * free, every, needed)])
    return max(layers for of_rank in found for layers in of_rank)


def memory_of(
    run: Run, model: Any, config: Phi3VConfig, largest: dict[str, int], ranks: Ranks, choices: Choices
) -> dict[str, float]:
    """The estimated memory of a run by part, for its `largest` pack."""
    return estimate(
        model,
        config,
        **largest,
        bytes_per_value=choices.dtype.itemsize,
        recompute=choices.recompute,
        engine=choices.engine,
        num_ranks=ranks.num,
        optimizer=run.optim.optimizer,
    )
