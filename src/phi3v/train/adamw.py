"""AdamW in less memory than float32's 16 bytes a weight: moments in eight bits, or everything in bf16.

    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    w = (1 - rate decay) w - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

The arithmetic is float32 whatever is kept: a parameter is widened, updated and put back before the next one, a large
one in chunks. t is the parameter's own count of its steps.

Invariant: a step is a function of weights, gradients, moments, counts and the run's seed. Checkpoints hold nothing
random, and replicas with equal gradients stay equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 2**22
"""Weights that are float32 at a time: 16 MB for each of the five or so values that an update needs."""

MIN_8BIT = 4096
"""Parameters with fewer weights (norms, biases) keep float32 moments, as bitsandbytes has it: they cost nothing."""

BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit moments; its kernels know no other."""


class Bytes(NamedTuple):
    """Of memory, for every weight that learns."""

    weight: float
    gradient: float
    moments: float


BYTES = {
    "adamw": Bytes(4, 4, 8),
    "adamw-8bit": Bytes(4, 4, 2 + 2 * 4 / BLOCK),
    "adamw-bf16": Bytes(2, 2, 4),
}


def weight_dtype(optimizer: str) -> torch.dtype:
    """Of the weights that learn, and so of their gradients."""
    return torch.bfloat16 if optimizer == "adamw-bf16" else torch.float32


class _OneByOne(torch.optim.Optimizer):
    """A step, parameter by parameter; what a subclass keeps of the moments is its own business."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # on the CPU, where it can be read without waiting for a GPU
                    state |= self._moments(parameter)
                state["step"] += 1
                self._update(parameter, state, int(state["step"]), group)

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Zeros. `exp_avg`, `exp_avg_sq`: a value an element; a name that ends with `_scale`: one a block."""
        raise NotImplementedError

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], count: int, group: dict[str, Any]) -> None:
        raise NotImplementedError


class AdamW8bit(_OneByOne):
    """bitsandbytes' blockwise 8-bit AdamW (Dettmers et al., arXiv 2110.02861): 10 bytes a weight.

    Its kernels, but a count that a checkpoint can be read into. Moments are codes for 256 values between -1 and 1 (0
    and 1), close together near zero, with a scale for every block of 256. Weights and gradients are float32.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        from bitsandbytes.functional import create_dynamic_map

        super().__init__(groups, **settings)
        self.codes = {signed: create_dynamic_map(signed=signed) for signed in (True, False)}

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        names = ("exp_avg", "exp_avg_sq")
        if parameter.numel() < MIN_8BIT:
            return {name: torch.zeros_like(parameter) for name in names}
        scales = parameter.new_zeros(-(-parameter.numel() // BLOCK))  # zero times any code is zero
        return {
            **{name: torch.zeros_like(parameter, dtype=torch.uint8) for name in names},
            **{f"{name}_scale": scales.clone() for name in names},
        }

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], count: int, group: dict[str, Any]) -> None:
        from bitsandbytes import functional

        settings = {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"], "lr": group["lr"]}
        settings |= {"weight_decay": group["weight_decay"], "step": count}
        settings |= {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        weight, gradient = parameter.detach(), parameter.grad.contiguous()  # type: ignore[union-attr]
        assert weight.is_contiguous()  # the kernels go by addresses
        if state["exp_avg"].dtype == torch.float32:
            functional.optimizer_update_32bit("adam", gradient, weight, **settings)
            return
        self.codes = {signed: codes.to(weight.device) for signed, codes in self.codes.items()}
        functional.optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            weight,
            **settings,
            beta3=0.0,  # of other optimizers
            alpha=0.0,
            qmap1=self.codes[True],
            qmap2=self.codes[False],
            absmax1=state["exp_avg_scale"],
            absmax2=state["exp_avg_sq_scale"],
        )


class AdamWBf16(_OneByOne):
    """AdamW that keeps nothing but bf16: weights, gradients and both moments, 8 bytes a weight.

    bf16 has 8 bits: rounding to the nearest would lose every change of a weight below a 512th of it, at a learning rate
    of 1e-5 nearly all of them, and with beta2 = 0.999 a second moment would never fall. So what is put back is rounded
    stochastically: up or down, with such chances that the mean is the float32 value. The weights go where float32 goes,
    but each at a random walk: it arrives off by about sqrt(way * gap), the way it has come times the gap between its
    bf16 neighbours (a 256th to a 128th of it).

    The noise is drawn anew for every parameter from the run's seed, its number in the groups and its count of steps:
    the same on every rank, after every resume, and whoever else sleeps.

    Gradients are bf16 as well: autograd adds up the packs of a step in bf16, and ranks are averaged in it. An addition
    rounds to the nearest, by at most a 256th of the sum so far. Measured on a small model, 14 packs added up so are
    0.4 % (of the norm) from their exact sum; bf16 arithmetic itself makes gradients that are 2.2 % from float32's. So
    four more bytes a weight for a float32 sum would hardly show; but few large packs lose less than many small ones.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, seed: int, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.seed = seed
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self.noise: dict[torch.device, torch.Generator] = {}

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], count: int, group: dict[str, Any]) -> None:
        noise = self.noise.setdefault(parameter.device, torch.Generator(parameter.device))
        noise.manual_seed(((self.seed * 1_000_003 + count) * 65_537 + self.numbers[parameter]) % 2**63)
        (beta1, beta2), rate, eps = group["betas"], group["lr"], group["eps"]
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        kept_whole = parameter.detach(), state["exp_avg"], state["exp_avg_sq"]
        flat = [*(tensor.view(-1) for tensor in kept_whole), parameter.grad.reshape(-1)]  # type: ignore[union-attr]
        for w, m, v, g in zip(*(tensor.split(CHUNK) for tensor in flat), strict=True):
            gradient = g.float()
            first = m.float().lerp_(gradient, 1 - beta1)
            second = v.float().lerp_(gradient.square_(), 1 - beta2)
            denominator = (second / correction2).sqrt_().add_(eps)
            weight = w.float().mul_(1 - rate * group["weight_decay"])
            weight.addcdiv_(first, denominator, value=-rate / correction1)
            for kept, value in ((w, weight), (m, first), (v, second)):
                kept.copy_(round_stochastically_(value, noise))


def round_stochastically_(values: Tensor, noise: torch.Generator) -> Tensor:
    """float32 values, in place, to neighbours among the bf16 numbers: unbiased; those that are bf16 already stay.

    bf16 is the upper half of a float32. A number below 2^16 added to the bits carries into that half as often as the
    lower half says, away from zero for either sign.
    """
    bits = values.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, generator=noise, dtype=torch.int32, device=bits.device)
    bits &= -(2**16)
    return values
