"""How much arithmetic a step is, and how much of the hardware's best that makes.

The rule of counting: what the objective needs and no more. 2 operations per weight and token forward; backward as many
for the gradient of the input and, if the weight learns, as many for its own; attention over the visible pairs alone
(causal: half of all); the head, and the last layer but its keys and values, at target rows; crops that are padding
never. Recomputed activations do not count, nor do adapters (1 or 2 %), norms and activation functions. A picture of one
tile counts as two crops, though its global view is that tile and CLIP runs once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from phi3v.base.cards import card_of_device
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.parts import part_of
from phi3v.model.vision import MERGED, PATCH, PATCHES
from phi3v.packing.schedule import Step


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak TFLOP/s of the card; None for a CPU, in float32, or if the card is unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    card = card_of_device(torch.cuda.get_device_name(device))
    return card.tflops if card else None


@dataclass(frozen=True, kw_only=True)
class Products:
    """Multiplications of a forward pass, each with an addition, by the part of the model they are in."""

    keys: int
    """Key and value projections of a decoder layer, a token."""
    rest: int
    """Query and output projections and the MLP of a decoder layer, a token."""
    pair: int
    """Attention of a decoder layer, a query token and a key token that it sees."""
    head: int
    """Of a row."""
    patches: int
    """Patch embedding, a crop."""
    clip_layer: int
    """Weights of a CLIP layer, a crop."""
    clip_pairs: int
    """Attention of a CLIP layer, a crop."""
    projector: tuple[int, int]
    """Its two layers, a crop."""

    @classmethod
    def of(cls, config: Phi3VConfig) -> Products:
        hidden, width, clip = config.hidden_size, config.head_dim, config.clip
        dim, tokens = clip["hidden_size"], MERGED * MERGED
        heads = config.num_attention_heads * width
        return cls(
            keys=2 * hidden * config.num_key_value_heads * width,
            rest=2 * hidden * heads + 3 * hidden * config.intermediate_size,
            pair=2 * heads,
            head=hidden * config.vocab_size,
            patches=PATCHES * 3 * PATCH * PATCH * dim,
            clip_layer=PATCHES * (4 * dim * dim + 2 * dim * clip["intermediate_size"]),
            clip_pairs=2 * PATCHES * PATCHES * dim,
            projector=(tokens * 4 * dim * hidden, tokens * hidden * hidden),
        )


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of training, forward and backward, by what they grow with."""

    per_token: float
    """A token the decoder runs over."""
    per_pair: float
    """A query token and a key token that it sees."""
    per_row: float
    """A target row: what only such rows go through."""
    per_crop: float
    """A crop: CLIP and the projector."""

    def of(self, step: Step) -> float:
        """Operations of one optimizer step, over all ranks."""
        work = self.per_token * step.tokens + self.per_pair * step.pairs + self.per_row * step.target_rows
        return work + self.per_crop * step.crops


def training_flops(model: nn.Module, config: Phi3VConfig) -> Flops:
    """What a step of `model` costs, given which of its weights learn (`requires_grad`) and which have adapters."""
    learns, reached = set[str](), set[str]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            reached.add(part_of(name))
            if "lora_" not in name:
                learns.add(part_of(name))

    def times(part: str, below: set[str]) -> int:
        """Forward; the gradient of the weights; and that of the input, if something learns there or before."""
        return 1 + (part in learns) + bool(reached & below)

    one, layers = Products.of(config), config.num_hidden_layers - 1
    clip_layers = config.clip["num_hidden_layers"] - 1  # features are those before the last layer
    decoder = times("decoder", {"decoder", "embeddings", "projector", "vision"})
    tower = times("vision", {"vision"}) * one.clip_layer * clip_layers + times("vision", set()) * one.patches
    # Attention has no weights: its backward pass is twice its forward, or is not run at all.
    tower += (3 if "vision" in reached else 1) * one.clip_pairs * clip_layers
    first, second = one.projector
    projector = times("projector", {"vision"}) * first + times("projector", {"vision", "projector"}) * second
    return Flops(
        per_token=2.0 * decoder * (layers * (one.keys + one.rest) + one.keys),
        per_pair=2.0 * 3 * layers * one.pair,
        per_row=2.0 * decoder * (one.rest + one.head),
        per_crop=2.0 * (tower + projector),
    )


def recomputing_flops(model: nn.Module, config: Phi3VConfig, step: Step, layers: int) -> float:
    """What computing the first `layers` layers (of the decoder, then of CLIP) a second time adds to a step."""
    one, in_decoder = Products.of(config), min(layers, config.num_hidden_layers)
    learns = any(p.requires_grad for name, p in model.named_parameters() if part_of(name) == "vision")
    in_clip = layers - in_decoder if learns else 0
    whole = min(in_decoder, config.num_hidden_layers - 1)  # the last layer runs its target rows alone
    decoder = whole * ((one.keys + one.rest) * step.tokens + one.pair * step.pairs)
    decoder += (in_decoder - whole) * (one.keys * step.tokens + one.rest * step.target_rows)
    return 2.0 * (decoder + in_clip * (one.clip_layer + one.clip_pairs) * step.crops)


def achieved(work: float, seconds: float, num_devices: int, peak: float | None) -> dict[str, float]:
    """TFLOP/s of each of the devices that have done `work` operations, and its share of `peak` (MFU) where known."""
    tflops = work / seconds / num_devices / 1e12
    return {"tflops": tflops} if peak is None else {"tflops": tflops, "mfu": tflops / peak}
