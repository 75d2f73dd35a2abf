"""The original's way to compute a loss, which is our own model with every saving switched off, and the savings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.bench.sample import Shape
from torch import Tensor

from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.packing.loss import weighted_cross_entropy
from phi3v.packing.pack import Pack
from phi3v.packing.schedule import Step
from phi3v.train.engines.engine import unwrap
from phi3v.train.flops import Products, training_flops

SAVINGS = {
    "recompute": "activations are kept, not computed again",
    "logits": "logits at target rows only",
    "rows": "the last layer at target rows only",
    "crops": "CLIP without its last layer and without padding",
    "packs": "several pages in one pass",
    "pages": "a page once for all its questions",
}
"""In the order in which they are switched on."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute the same loss."""

    name: str
    savings: frozenset[str]
    questions: int = 1
    """Asked about each page. The original computes each by itself, so that one tells what four cost."""


def variants(questions: int, *, ablation: bool) -> list[Variant]:
    """The original; one more saving at a time, or only all of them; and all of them with activations computed twice."""
    names = [name for name in SAVINGS if name != "pages"]
    found = [Variant(name="original", savings=frozenset())]
    if ablation:
        steps = [(f"+ {SAVINGS[names[n - 1]]}", frozenset(names[:n])) for n in range(1, len(names))]
        found += [Variant(name=name, savings=savings) for name, savings in steps]
    everything = frozenset(SAVINGS)
    for each in dict.fromkeys((1, questions)):
        name = f"phi3v, {each} question{'s' if each > 1 else ''} a page"
        found.append(Variant(name=name, savings=everything, questions=each))
        found.append(Variant(name=f"{name}, recomputing", savings=everything - {"recompute"}, questions=each))
    return found


def loss_of(model: Any, pack: Pack, savings: frozenset[str], num_crops: int) -> Tensor:
    """The pack's loss, a float32 scalar, the way `savings` say. `model` is plain or inside PEFT."""
    inner: Phi3VForCausalLM = unwrap(model)
    with nullcontext() if "crops" in savings else wasteful(inner, pack, num_crops):
        x = inner.model.embed_pack(pack)
    hidden = inner.model.decode_layout(x, pack.layout, pack.target_rows if "rows" in savings else None)
    if "rows" not in savings and "logits" in savings:
        hidden = hidden[pack.target_rows]
    logits = inner.lm_head(hidden).float()
    if "rows" in savings or "logits" in savings:
        return weighted_cross_entropy(logits, pack.targets, pack.loss_weights)
    targets = torch.full((pack.tokens,), -100, device=logits.device).index_copy(0, pack.target_rows, pack.targets)
    weights = torch.zeros(pack.tokens, device=logits.device).index_copy(0, pack.target_rows, pack.loss_weights)
    return (F.cross_entropy(logits, targets, ignore_index=-100, reduction="none") * weights).sum()


@contextmanager
def wasteful(model: Phi3VForCausalLM, pack: Pack, num_crops: int) -> Iterator[None]:
    """CLIP as the original runs it: all layers, and every picture filled up with crops of zeros."""
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    wanted = pack.image_sizes.shape[0] * (num_crops + 1)

    def forward(crops: Tensor) -> Tensor:
        padded = torch.cat([crops, crops.new_zeros(max(0, wanted - crops.shape[0]), *crops.shape[1:])])
        x = before_last = tower.pre_layrnorm(tower.embeddings(padded))
        for layer in tower.encoder.layers:
            before_last = x
            x = x.to(layer.layer_norm1.weight.dtype)  # the last layer never learns and is in the precision of the rest
            if tower.gradient_checkpointing and torch.is_grad_enabled():
                assert tower._gradient_checkpointing_func is not None
                x = tower._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x)
        return before_last[: crops.shape[0], 1:]

    tower.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del tower.forward


def hardware_flops(model: Any, config: Phi3VConfig, step: Step, savings: frozenset[str], shape: Shape) -> float:
    """Floating-point operations that a variant runs for a step, those that are run twice included."""
    needed, one = training_flops(model, config), Products.of(config)
    layers, clip_layers = config.num_hidden_layers, config.clip["num_hidden_layers"] - 1
    times = needed.per_row / (one.rest + one.head)  # 2 for each pass: forward, and backward with or without weights
    pairs, clip_layer = 2.0 * one.pair * step.pairs, 2.0 * (one.clip_layer + one.clip_pairs)
    work, crops = needed.of(step), step.crops
    if "rows" not in savings:
        work += times * one.rest * (step.tokens - step.target_rows) + 3 * pairs
        if "logits" not in savings:
            work += times * one.head * (step.tokens - step.target_rows)
    if "crops" not in savings:
        crops = step.examples * shape.images * (shape.num_crops + 1)
        # Crops of zeros go through CLIP, forward and backward, but not through the projector; the last layer forward.
        work += (crops - step.crops) * (needed.per_crop - times * sum(one.projector)) + crops * clip_layer
    if "recompute" not in savings:
        work += (2.0 * (one.keys + one.rest) * step.tokens + pairs) * (layers - ("rows" in savings))
        learns = any(p.requires_grad for name, p in model.named_parameters() if "img_processor" in name)
        work += learns * crops * clip_layer * clip_layers
    return work
