"""The gradient audit: does everything that should learn learn, and nothing else?

Frozen layers that silently never get a gradient have spoilt published results. In the first steps every gradient is
looked at; once all is well the audit is over and costs nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from phi3v.errors import InputError

# Steps with images after which every parameter must have been reached. Two would do (LoRA's A gets its first gradient
# once B has moved); one more allows for a step whose few images happen to leave a unit silent.
STEPS_TO_REACH_ALL = 3

# Zero by analysis: softmax does not change when the same vector is added to all keys.
ALWAYS_ZERO = ("self_attn.k_proj.bias",)


class GradientAudit:
    """Call `check` after every backward pass, before the optimizer steps, until `done`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.unreached = {
            name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(ALWAYS_ZERO)
        }
        self.steps_with_images = 0
        self.done = False

    def check(self, *, images: bool, skipped: bool = False) -> None:
        """`images`: did this step have any? `skipped`: fp16 overflow, the optimizer will not step.

        Raises InputError, naming the parameter, for a gradient that is not finite, a frozen parameter with a gradient,
        or a trainable one that was never reached.
        """
        if self.done or skipped:
            return
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            if not parameter.requires_grad:
                raise InputError(f"gradient audit: {name} is frozen, but it has a gradient")
            if not torch.isfinite(gradient).all():
                raise InputError(f"gradient audit: the gradient of {name} is not finite")
            if name in self.unreached and bool(gradient.any()):
                self.unreached.discard(name)
        self.steps_with_images += images
        if not self.unreached:
            self.done = True
        elif self.steps_with_images >= STEPS_TO_REACH_ALL:
            name = min(self.unreached)
            more = f" and {len(self.unreached) - 1} more" if len(self.unreached) > 1 else ""
            raise InputError(
                f"gradient audit: {name}{more} should learn, but got no gradient "
                f"in {self.steps_with_images} steps with images"
            )
