"""What the training loop asks of an engine, whichever one spreads the work over the ranks.

An engine owns the model's place (device, precision, shards), the backward pass and the optimizer's step. Its promise:
whatever the engine and the number of ranks, a step gives the loss, the gradients and the weights of one rank alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from phi3v.packing.pack import Pack


class StepResult(NamedTuple):
    """What came of an optimizer step."""

    norm: float
    """Global L2 norm of the gradients before clipping."""
    skipped: bool
    """The gradients were not finite: no weight has changed."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements [start, start + n) of a flattened trainable parameter, as one rank holds them.

    The tensors are the engine's own memory, [n] each: what is written into them is what is trained on.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    state: dict[str, Tensor]
    """Of the optimizer: one value an element, `exp_avg` and `exp_avg_sq` for AdamW. Empty before its first step."""
    count: Tensor | None
    """The optimizer's own count of its steps."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Of an optimizer with 8-bit moments: one value a block of elements. Only a slice that is a whole parameter has
    any."""


class Engine(Protocol):
    """One model and its optimizer in training."""

    model: Any
    optimizer: torch.optim.Optimizer

    def learn(self, pack: Pack, *, last: bool) -> Tensor:
        """Forward and backward pass over a pack of this rank; returns its share of the step's loss, a scalar.

        `last` says that the step's gradients are complete after it. Every rank calls this equally often.
        """
        ...

    def step(self) -> StepResult:
        """Clips the gradients, updates the weights, forgets the gradients."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Between the last `learn` and `step`: what this rank holds of the gradient of every parameter."""
        ...

    def slices(self) -> Iterator[Slice]:
        """Everything this rank holds of what is trained."""
        ...

    def owns(self, name: str) -> bool:
        """Whether this rank is the one to save its slice of a parameter; others may hold the same."""
        ...

    def make_state(self) -> None:
        """Gives the optimizer's state its memory before the first step, so that `slices` can be written into."""
        ...

    def slices_written(self) -> None:
        """To be called when weights have been written into `slices`."""
        ...

    def whole(self) -> AbstractContextManager[Any]:
        """The model with all its weights on every rank, as they are now, for evaluation."""
        ...

    def final(self, dtype: torch.dtype | None) -> Any:
        """Ends the training: the whole model on every rank, from the weights that learnt, in `dtype` if given."""
        ...

    def scaler_state(self) -> dict[str, Any]:
        """Of the loss scale (fp16), `scale` and how many `good_steps` it has stood; empty without one."""
        ...

    def load_scaler_state(self, state: dict[str, Any]) -> None: ...


SCALE_WINDOW = 2000  # good steps after which a loss scale is doubled


def bare(model: Any) -> Any:
    """The model without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def same_work_on_every_rank(model: Any) -> None:
    """Every pack runs the image embedder, if only on a blank crop that counts for nothing.

    Engines reduce gradients and gather weights together: a rank whose pack has no picture must do so as well.
    """
    bare(model).model.always_embed_images = True


def empty_twin(model: nn.Module, kept: Iterable[nn.Parameter] = ()) -> Any:
    """The same modules with parameters of no elements, to be filled when needed; `kept` parameters are shared."""
    twins = {id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in model.parameters()}
    twins |= {id(p): p for p in kept}
    return copy.deepcopy(model, memo=twins)


def empty(twin: nn.Module) -> None:
    """Gives the memory of its weights back, but for the quantised ones, which it shares."""
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.new_empty(0)


def rounded(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight


def idle_step(optimizer: torch.optim.Optimizer) -> None:
    """A step with zero gradients at learning rate zero: no weight changes, but the state has its memory then."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["asleep"] = 0.0, False
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def build_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Halves the loss scale at every overflow; does nothing but in fp16."""
    return torch.amp.GradScaler(device.type, growth_interval=SCALE_WINDOW, enabled=dtype == torch.float16)


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """As `Engine.scaler_state` says."""
    state = scaler.state_dict()
    return {"scale": state["scale"], "good_steps": state["_growth_tracker"]} if state else {}


def load_scaler_state(scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
    if scaler.is_enabled() and state:
        found = {"scale": state["scale"], "_growth_tracker": state["good_steps"]}
        scaler.load_state_dict(scaler.state_dict() | found)
