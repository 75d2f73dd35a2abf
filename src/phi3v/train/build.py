"""The model of a run: its weights, what of it learns, and how it is computed."""

from __future__ import annotations

from typing import Any

import torch

from phi3v.base.config import Run
from phi3v.base.console import progress_bar
from phi3v.base.errors import InputError
from phi3v.base.hardware import why_not_compile
from phi3v.base.ranks import Ranks
from phi3v.model import fp8
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.loading import load_model
from phi3v.model.parts import add_lora, count_parameters, freeze, recompute_layers
from phi3v.model.phi3v import Phi3VForCausalLM
from phi3v.model.quantization import Quantization, quantize
from phi3v.packing.schedule import plan_epoch
from phi3v.train.engines import Parallel
from phi3v.train.feed import TrainingData
from phi3v.train.memory import estimate, layers_to_recompute

# `--activation-checkpointing auto`: steps whose packs are looked at, and the share of free memory that is planned with.
STEPS_LOOKED_AT, MEMORY_TO_USE = 100, 0.9


def build_model(
    run: Run, attention: str, dtype: torch.dtype, ranks: Ranks, recompute: int, *, shell: Phi3VConfig | None = None
) -> Any:
    """The model with what learns and what does not, as loaded; of the sizes of `shell`, if given, but without weights.

    `recompute` is a number of layers, as `pick_recompute` finds it.
    """
    tuning = run.tuning
    if shell is None:
        model, _ = load_model(run.base.model, attention=attention)
    else:
        with torch.device("meta"):
            model = Phi3VForCausalLM(shell)
    freeze(model, tuning.frozen)
    if tuning.qlora:
        how = Quantization(double_quant=tuning.double_quant, parts=tuning.quantize)
        total = count_parameters(model)["decoder"][1]
        with progress_bar("quantising", total, "weights", show=run.keeping.progress and not shell) as advance:
            quantize(model, how, compute_dtype=dtype, device=None if shell else ranks.device, advance=advance)
    if tuning.adapters:
        model = add_lora(
            model,
            frozen=tuning.frozen,
            rank=tuning.lora_rank,
            alpha=tuning.alpha,
            dropout=tuning.lora_dropout,
            init="default" if shell else tuning.lora_init,
            dora=tuning.dora,
            rslora=tuning.rslora,
        )
    if recompute:
        recompute_layers(model, recompute)
    return model


def restore_frozen(model: Any, run: Run) -> None:
    """What did not learn is what it was: to compute with, it has been rounded to a precision that holds less."""
    base, _ = load_model(run.base.model)
    freeze(base, run.tuning.frozen)
    for name, parameter in base.named_parameters():
        if not parameter.requires_grad:
            weight = model.get_parameter(name)
            weight.data = parameter.data.to(weight.device)


def pick_recompute(
    run: Run,
    config: Phi3VConfig,
    data: TrainingData,
    ranks: Ranks,
    *,
    attention: str,
    dtype: torch.dtype,
    engine: Parallel,
) -> int:
    """The number of layers to recompute for `--activation-checkpointing`; auto decides by the GPU's free memory."""
    every = config.num_hidden_layers + config.clip["num_hidden_layers"] - 1
    if run.tuning.activation_checkpointing != "auto" or ranks.device.type != "cuda":
        return every if run.tuning.activation_checkpointing == "full" else 0
    shell = build_model(run, attention, dtype, ranks, 0, shell=config)
    plan = plan_epoch(data.lengths, data.settings, seed=run.keeping.seed, epoch=0)
    seen = [data.largest_pack(plan.packs(step, ranks.num)[1]) for step in range(min(len(plan), STEPS_LOOKED_AT))]
    largest = {name: max(sizes[name] for sizes in seen) for name in seen[0]}

    def needed(layers: int) -> float:
        return estimate(
            shell,
            config,
            **largest,
            bytes_per_value=dtype.itemsize,
            recompute=layers,
            engine=engine,
            num_ranks=ranks.num,
            optimizer=run.optim.optimizer,
        )["total"]

    free = torch.cuda.mem_get_info(ranks.device)[0] / 1e9
    found = ranks.gather([layers_to_recompute(MEMORY_TO_USE * free, every, needed)])
    return max(layers for of_rank in found for layers in of_rank)


def pick_compile(run: Run, engine: Parallel, ranks: Ranks) -> bool:
    """Whether the layers are compiled. Raises InputError where they are to be, but cannot be."""
    reason = why_not_compile(ranks.device)
    if run.tuning.dora:
        reason = "PEFT's --dora cannot be compiled in one piece"
    elif engine != "ddp":
        reason = f"--parallel {engine} splits the weights"
    if run.base.compile == "on" and reason:
        raise InputError(f"--compile on: {reason}")
    return run.base.compile == "on" or (run.base.compile == "auto" and ranks.device.type == "cuda" and not reason)


def check_fp8(dtype: torch.dtype, engine: Parallel, ranks: Ranks) -> None:
    """Raises InputError where `--fp8` cannot be had."""
    reason = fp8.why_not(ranks.device, dtype)
    if engine != "ddp":
        reason = f"--parallel {engine} splits the weights"
    if reason:
        raise InputError(f"--fp8: {reason}")


def check_attention(run: Run, attention: str, config: Phi3VConfig, ranks: Ranks) -> None:
    """Raises InputError for an attention that this model cannot be trained with."""
    if attention == "flex_attention" and config.attention_dropout:
        raise InputError(f"--attention flex_attention has no dropout, {run.base.model} asks for it: choose sdpa")
    if attention == "flex_attention" and ranks.device.type == "cpu":
        raise InputError("--attention flex_attention has no backward pass on a CPU: choose sdpa")
