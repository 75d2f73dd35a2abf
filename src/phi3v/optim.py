"""AdamW, its parameter groups and its schedule."""

from __future__ import annotations

import torch
from torch import nn
from transformers import get_scheduler

from phi3v.config import Optim
from phi3v.model.parts import part_of


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Fused AdamW over the trainable parameters, grouped by learning rate and weight decay.

    Biases and norm weights do not decay, as in the original recipe's trainer. A parameter without a gradient in a step
    is left alone: no update and no decay.
    """
    rates = {"vision": optim.vision_learning_rate, "projector": optim.projector_learning_rate}
    # The decoder's group comes first: its learning rate is the one that is shown.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(optim.learning_rate, optim.weight_decay): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = rates.get(part_of(name))
        decays = parameter.ndim > 1 and not name.endswith("bias")
        key = (optim.learning_rate if rate is None else rate, optim.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
            if parameters
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, optim: Optim, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up from zero over `warmup_steps`, then `schedule` down to zero at `total_steps` (constant: no descent)."""
    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=total_steps)
