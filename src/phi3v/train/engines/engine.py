"""The interface of an engine, and the half that the engines of PyTorch share.

An engine owns the model's place (device, precision, shards), the backward pass and the optimizer step. Invariant: with
any engine and any number of ranks, a step gives the loss, the gradients and the weights of one rank alone.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phi3v.base.ranks import Ranks
from phi3v.packing.pack import Pack

SCALE_WINDOW = 2000
"""Steps without overflow after which the loss scale (fp16) is doubled."""

MIN_SCALE = 1.0
"""Below this loss scale an overflow is no longer a matter of precision."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine trains."""

    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""

    dtype: torch.dtype = torch.float32
    """Precision of the arithmetic."""

    learning: torch.dtype = torch.float32
    """Precision of the weights that learn and of their gradients; only ddp supports another one than float32."""


class StepResult(NamedTuple):
    """Outcome of an optimizer step."""

    norm: float
    """Global L2 norm of the gradients before clipping."""
    skipped: bool
    """The gradients were not finite: no weight has changed."""
    overflow: bool = False
    """A skipped step in fp16 whose loss scale has been halved, so that a later step can succeed."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements [start, start + n) of a flattened trainable parameter, as one rank holds them.

    The tensors, [n] each, share the engine's memory: writing into them changes the weights that are trained.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    state: dict[str, Tensor]
    """Optimizer state with one value an element, `exp_avg` and `exp_avg_sq` for AdamW. Empty before its first step."""
    count: Tensor | None
    """The optimizer's own count of its steps."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Scales of 8-bit moments, one value a block of elements. Only a slice that is a whole parameter has any."""
    saved_here: bool = True
    """Whether this rank writes the slice into a checkpoint; others may hold the same one."""


class Engine(ABC):
    """One model and its optimizer in training."""

    model: Any
    optimizer: torch.optim.Optimizer

    def __init__(self, model: Any, ranks: Ranks, settings: EngineSettings) -> None:
        self.model, self.ranks, self.settings = model, ranks, settings
        if ranks.num > 1:
            # Engines reduce gradients and gather weights on all ranks together, so every pack runs the image embedder:
            # a rank whose pack has no image runs it on a blank crop that does not count.
            unwrap(model).model.always_embed_images = True

    @abstractmethod
    def learn(self, pack: Pack, *, last: bool) -> Tensor:
        """Forward and backward pass over a pack of this rank; returns its share of the step's loss, a scalar.

        `last` marks the last pack of the step, after which the gradients are complete. Every rank calls this equally
        often.
        """

    @abstractmethod
    def step(self) -> StepResult:
        """Clips the gradients, updates the weights and clears the gradients."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Between the last `learn` and `step`: the gradient of every parameter, or the part that this rank holds."""

    @abstractmethod
    def slices(self) -> Iterator[Slice]:
        """All weights that learn, with their optimizer state, as far as this rank holds them."""

    @abstractmethod
    def writable(self) -> AbstractContextManager[list[Slice]]:
        """The slices with their optimizer state allocated, to write a checkpoint into while the context lasts."""

    def whole(self) -> AbstractContextManager[Any]:
        """The model with all its current weights on every rank, for evaluation."""
        return nullcontext(self.model)

    @abstractmethod
    def final(self, dtype: torch.dtype | None) -> Any:
        """Ends the training: the whole model on every rank, from the weights that learnt, in `dtype` if given."""

    @abstractmethod
    def scaler_state(self) -> dict[str, Any]:
        """The loss scale (fp16) as `scale`, and for how many `good_steps` it has stood; {} without one."""

    @abstractmethod
    def load_scaler_state(self, state: dict[str, Any]) -> None: ...

    def has_scale_left(self) -> bool:
        """Whether a skipped step may be followed by one with a smaller loss scale that succeeds."""
        return self.scaler_state().get("scale", 0.0) >= MIN_SCALE


class TorchEngine(Engine):
    """Autocast, loss scaling, clipping and optimizer state as PyTorch has them; subclasses place the model."""

    def __init__(self, model: Any, ranks: Ranks, settings: EngineSettings) -> None:
        super().__init__(model, ranks, settings)
        self.optimizer = settings.make_optimizer(model)
        self.scaler = torch.amp.GradScaler(
            ranks.device.type, growth_interval=SCALE_WINDOW, enabled=settings.dtype == torch.float16
        )

    def backward(self, network: nn.Module, pack: Pack) -> Tensor:
        """Both passes over a pack; returns the loss."""
        dtype = self.settings.dtype
        with torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32):
            loss = network(pack=pack, learn=True).loss
        # The weights of a step add up to one over all ranks, and gradients are averaged over them.
        self.scaler.scale(loss * self.ranks.num).backward()
        return loss.detach()

    def step(self) -> StepResult:
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        if finite := math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, not finite, overflow=not finite and self.has_scale_left())

    def _clip(self) -> float:
        """The global norm before; in float32 also of bf16 gradients, whose own norms would have three digits."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable if p.grad is not None]
        wide = [g if g.dtype == torch.float32 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = nn.utils.get_total_norm(wide)
        nn.utils.clip_grads_with_norm_(trainable, self.settings.max_grad_norm, norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in self.model.named_parameters():
            yield name, None if parameter.grad is None else local(parameter.grad)

    def slices(self) -> Iterator[Slice]:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            state = {key: local(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
            count = state.pop("step", None)
            yield Slice(
                name=name,
                shape=tuple(parameter.shape),
                start=self.start_of(parameter),
                weight=local(parameter.detach()).view(-1),
                state={key: value.view(-1) for key, value in state.items() if not key.endswith("_scale")},
                scales={key: value for key, value in state.items() if key.endswith("_scale")},
                count=count,
                saved_here=self.saves(name),
            )

    def start_of(self, parameter: nn.Parameter) -> int:
        """The first element of a flattened parameter that this rank holds."""
        return 0

    def saves(self, name: str) -> bool:
        """Whether this rank writes its slice of a parameter into a checkpoint."""
        return True

    @contextmanager
    def writable(self) -> Iterator[list[Slice]]:
        idle_step(self.optimizer)
        yield list(self.slices())

    def scaler_state(self) -> dict[str, Any]:
        state = self.scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]} if state else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled() and state:
            found = {"scale": state["scale"], "_growth_tracker": state["good_steps"]}
            self.scaler.load_state_dict(self.scaler.state_dict() | found)


def unwrap(model: Any) -> Any:
    """The model without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def empty_twin(model: nn.Module, shared: Iterable[nn.Parameter] = ()) -> Any:
    """The same modules with parameters of no elements, to be filled when needed; `shared` parameters are the same."""
    twins = {id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in model.parameters()}
    twins |= {id(p): p for p in shared}
    return copy.deepcopy(model, memo=twins)


def empty(twin: nn.Module) -> None:
    """Frees the weights of a twin, except for the quantized ones, which it shares."""
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.new_empty(0)


def rounded(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight


def idle_step(optimizer: torch.optim.Optimizer) -> None:
    """A step with zero gradients at learning rate zero: it changes no weight, but allocates the state."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["asleep"] = 0.0, False
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
