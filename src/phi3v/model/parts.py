"""Which weights are trained, and in which precision: parts of the model by name, freezing, LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from phi3v.model.phi3v import Phi3VForCausalLM, Phi3VModel
from phi3v.model.quantization import compute_in

EMBEDDER = "model.vision_embed_tokens."
TOWER = EMBEDDER + "img_processor.vision_model."


def part_of(name: str) -> str:
    """The part of a parameter or module: vision, projector, embeddings or decoder (including the head and norms)."""
    name = name.removeprefix("base_model.model.")  # PEFT's prefix
    if name.startswith(EMBEDDER + "img_processor."):
        return "vision"
    if name.startswith(EMBEDDER):
        return "projector"
    return "embeddings" if name.startswith("model.embed_tokens") else "decoder"


def unused_tail(model: Phi3VForCausalLM) -> tuple[str, ...]:
    """Name prefixes of the CLIP weights that are in the checkpoint but never run: the last layer, `post_layernorm`."""
    last = model.config.clip["num_hidden_layers"] - 1
    return (f"{TOWER}encoder.layers.{last}.", f"{TOWER}post_layernorm.")


def freeze(model: Phi3VForCausalLM, parts: Iterable[str]) -> None:
    """Make everything trainable but the given parts, the unused CLIP tail and 4-bit weights."""
    parts, tail = set(parts), unused_tail(model)
    for name, parameter in model.named_parameters():
        trainable = part_of(name) not in parts and not name.startswith(tail) and parameter.is_floating_point()
        parameter.requires_grad_(trainable)


def lora_targets(model: Phi3VForCausalLM, frozen: Iterable[str]) -> list[str]:
    """Full names of the linears that get adapters: those of the decoder, `lm_head`, and the parts not frozen."""
    frozen, tail = set(frozen), unused_tail(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) not in frozen and not name.startswith(tail)
    ]


def add_lora(
    model: Phi3VForCausalLM,
    *,
    frozen: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float,
    init: str,
    dora: bool,
    rslora: bool,
) -> Any:
    """The model inside PEFT with new adapters, which alone are trainable."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights=True if init == "default" else init,
        use_dora=dora,
        use_rslora=rslora,
        target_modules=lora_targets(model, frozen),
    )
    return get_peft_model(model, config)


def recompute_layers(model: Any, layers: int) -> None:
    """Recompute the activations of the first `layers` layers, counted through the decoder and then through CLIP."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    decoder = next(module for module in model.modules() if isinstance(module, Phi3VModel))
    decoder.recomputed_layers = min(layers, len(decoder.layers))
    tower = decoder.vision_embed_tokens.img_processor.vision_model
    tower.recomputed_layers = layers - decoder.recomputed_layers


def set_precision(model: nn.Module, dtype: torch.dtype, *, learning: torch.dtype = torch.float32) -> None:
    """Cast trainable weights to `learning` and all others to `dtype`, as autocast expects, without second copies.

    4-bit weights keep their bits and are multiplied in `dtype`.
    """
    for parameter in model.parameters():
        wanted = learning if parameter.requires_grad else dtype
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
    compute_in(model, dtype)


def widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights of less precision than `dtype` to `dtype`.

    4-bit weights keep their bits and are multiplied in `dtype`.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, dtype))
    compute_in(model, dtype)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(Trainable parameters, all parameters) by part."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        trainable, every = counts.get(part_of(name), (0, 0))
        number = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)  # two 4-bit weights per byte
        counts[part_of(name)] = (trainable + number * parameter.requires_grad, every + number)
    return counts


def quantized_weights(model: nn.Module) -> list[nn.Parameter]:
    """The packed weights of 4-bit layers: constants, of which every rank holds all."""
    return [parameter for parameter in model.parameters() if parameter.dtype == torch.uint8]
