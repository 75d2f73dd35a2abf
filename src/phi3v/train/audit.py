"""The gradient audit: does everything that should learn learn, and nothing else?

Frozen layers that silently never get a gradient have spoilt published results. In the first steps every gradient is
looked at; once all is well the audit is over and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from phi3v.base.errors import InputError
from phi3v.base.ranks import ALONE, Ranks

# Steps with images after which every parameter must have been reached. Two would do (LoRA's A gets its first gradient
# once B has moved); one more allows for a step whose few images happen to leave a unit silent.
STEPS_TO_REACH_ALL = 3

# Zero by analysis: softmax does not change when the same vector is added to all keys.
ALWAYS_ZERO = ("self_attn.k_proj.bias",)


class GradientAudit:
    """Call `check` after every backward pass, before the optimizer steps, until `done`."""

    def __init__(self, model: nn.Module) -> None:
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.unreached = {name for name in self.trainable if not name.endswith(ALWAYS_ZERO)}
        self.steps_with_images = 0
        self.done = False

    def check(self, gradients: Iterable[tuple[str, Tensor | None]], *, images: bool, ranks: Ranks = ALONE) -> None:
        """`gradients`: of every parameter, or the part this rank holds. `images`: did this step have any?

        Raises InputError, naming the parameter, for a frozen parameter with a gradient, or a trainable one that was
        never reached. A gradient that is not finite is the loop's business: the step does not count here.
        """
        if self.done:
            return
        reached, frozen, finite = set(), set(), True
        for name, gradient in gradients:
            if gradient is None:
                continue
            if name not in self.trainable:
                frozen.add(name)
            finite = finite and bool(torch.isfinite(gradient).all())
            if name in self.unreached and bool(gradient.any()):
                reached.add(name)
        if ranks.any(not finite):
            return
        if frozen := {name for names in ranks.gather(sorted(frozen)) for name in names}:
            raise InputError(f"gradient audit: {min(frozen)} is frozen, but it has a gradient")
        self.unreached -= {name for names in ranks.gather(sorted(reached)) for name in names}
        self.steps_with_images += images
        if not self.unreached:
            self.done = True
        elif self.steps_with_images >= STEPS_TO_REACH_ALL:
            name = min(self.unreached)
            more = f" and {len(self.unreached) - 1} more" if len(self.unreached) > 1 else ""
            steps = f"{self.steps_with_images} steps with images"
            raise InputError(f"gradient audit: {name}{more} should learn, but got no gradient in {steps}")
