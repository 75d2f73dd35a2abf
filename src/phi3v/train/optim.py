"""The optimizer, its parameter groups and its schedule."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import get_scheduler

from phi3v.base.config import Optim
from phi3v.model.parts import part_of
from phi3v.train.adamw import AdamW8bit, AdamWBf16

IMAGE_PARTS = ("vision", "projector")  # reached by examples with images only


def decaying(model: nn.Module, rule: Literal["original", "matrices"]) -> set[str]:
    """Names of the parameters with weight decay.

    original: all but those with "bias" in their name and those of `nn.LayerNorm` modules (CLIP's), which is how the
    trainer of the original recipe grouped them. RMSNorm weights, CLIP's class embedding and the separators decay.
    matrices: parameters of two dimensions or more.
    """
    named = dict(model.named_parameters())
    if rule == "matrices":
        return {name for name, parameter in named.items() if parameter.ndim > 1 and not name.endswith("bias")}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return {name for name, parameter in named.items() if "bias" not in name and id(parameter) not in norms}


def build_optimizer(model: nn.Module, optim: Optim, *, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW (fused, in float32) over the trainable parameters, grouped by learning rate and weight decay.

    Parameters that only images reach have groups of their own, which `reach` puts to sleep. `seed` is the seed of
    stochastic rounding.
    """
    rates = {"vision": optim.vision_learning_rate, "projector": optim.projector_learning_rate}
    decays = decaying(model, optim.decay)
    # The decoder's group comes first: its learning rate is the one that is logged.
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {(False, optim.learning_rate, optim.weight_decay): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            rate = optim.learning_rate if (own := rates.get(part)) is None else own
            key = (part in IMAGE_PARTS, rate, optim.weight_decay if name in decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay, "needs_images": needs_images, "asleep": False}
        for (needs_images, rate, decay), parameters in groups.items()
        if parameters
    ]
    betas, eps = (optim.beta1, optim.beta2), optim.eps
    optimizer: torch.optim.Optimizer
    if optim.optimizer == "adamw-8bit":
        optimizer = AdamW8bit(described, betas=betas, eps=eps)
    elif optim.optimizer == "adamw-bf16":
        optimizer = AdamWBf16(described, betas=betas, eps=eps, seed=seed)
    else:
        optimizer = torch.optim.AdamW(described, betas=betas, eps=eps, fused=True)
    optimizer.register_step_pre_hook(_leave_out_sleepers)
    optimizer.register_step_post_hook(_bring_back_sleepers)
    return optimizer


def reach(optimizer: torch.optim.Optimizer, *, images: bool) -> None:
    """Puts the image parts to sleep for a step whose examples, on all ranks, have no images.

    A sleeping parameter is not updated, does not decay, and keeps its moments, whether its gradient is missing or, as
    in engines with several ranks, zero.
    """
    for group in optimizer.param_groups:
        group["asleep"] = group["needs_images"] and not images


def _leave_out_sleepers(optimizer: Any, *unused: Any) -> None:
    optimizer.all_groups = optimizer.param_groups
    optimizer.param_groups = [group for group in optimizer.param_groups if not group["asleep"]]


def _bring_back_sleepers(optimizer: Any, *unused: Any) -> None:
    optimizer.param_groups = optimizer.all_groups


def build_schedule(
    optimizer: torch.optim.Optimizer, optim: Optim, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up from zero over `warmup_steps`, then `schedule` down to zero at `total_steps` (constant: no descent)."""
    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=total_steps)
