"""The model of a run: its weights, which of them learn, and how it is computed."""

from __future__ import annotations

from typing import Any

import torch

from phi3v.base.config import Run
from phi3v.base.console import progress_bar
from phi3v.base.ranks import Ranks
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.loading import load_model
from phi3v.model.parts import add_lora, count_parameters, freeze, recompute_layers
from phi3v.model.phi3v import Phi3VForCausalLM
from phi3v.model.quantization import Quantization, quantize


def build_model(
    run: Run, attention: str, dtype: torch.dtype, ranks: Ranks, recompute: int, *, shell: Phi3VConfig | None = None
) -> Any:
    """The model as loaded, frozen and adapted; with `shell` one of these sizes without weights, on the meta device.

    The first `recompute` layers, of the decoder and then of CLIP, are recomputed in the backward pass.
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
        with progress_bar("quantizing", total, "weights", show=run.keeping.progress and not shell) as advance:
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
    """Puts the weights of the base checkpoint back into what is frozen, where arithmetic needed less precision."""
    base, _ = load_model(run.base.model)
    freeze(base, run.tuning.frozen)
    for name, parameter in base.named_parameters():
        if not parameter.requires_grad:
            weight = model.get_parameter(name)
            weight.data = parameter.data.to(weight.device)
