"""Every rank holds the whole model: one rank alone, or PyTorch's DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phi3v.base.ranks import Ranks
from phi3v.model.parts import set_precision
from phi3v.packing.pack import Pack
from phi3v.train.engines.engine import (
    Slice,
    StepResult,
    build_scaler,
    idle_step,
    load_scaler_state,
    rounded,
    same_work_on_every_rank,
    scaler_state,
)


class Replicated:
    """Gradients are averaged over the ranks; the optimizer runs on every rank alike."""

    def __init__(
        self,
        model: Any,
        ranks: Ranks,
        *,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        max_grad_norm: float,
        dtype: torch.dtype,
        learning: torch.dtype = torch.float32,
    ) -> None:
        """`learning` is the precision of the weights that learn and of their gradients."""
        self.model = model.to(ranks.device)  # first: on a GPU, or every process would widen a copy in the host's memory
        set_precision(model, dtype, learning=learning)
        self.ranks, self.max_grad_norm, self.dtype = ranks, max_grad_norm, dtype
        self.runs: nn.Module = self.model
        if ranks.num > 1:
            same_work_on_every_rank(model)
            self.runs = DistributedDataParallel(self.model, gradient_as_bucket_view=True)  # saves a copy of them
        self.optimizer = make_optimizer(model)
        self.scaler = build_scaler(ranks.device, dtype)

    def learn(self, pack: Pack, *, last: bool) -> Tensor:
        waits = not last and isinstance(self.runs, DistributedDataParallel)
        with self.runs.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.runs(pack=pack, learn=True).loss
            # The weights of a step add up to one over all ranks, and the gradients will be averaged.
            self.scaler.scale(loss * self.ranks.num).backward()
        return loss.detach()

    def step(self) -> StepResult:
        self.scaler.unscale_(self.optimizer)
        norm = float(self._clip())
        if finite := math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, not finite)

    def _clip(self) -> Tensor:
        """The global norm before; in float32 also of gradients in bf16, whose own norms would have three digits."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable if p.grad is not None]
        wide = [g if g.dtype == torch.float32 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = nn.utils.get_total_norm(wide)
        nn.utils.clip_grads_with_norm_(trainable, self.max_grad_norm, norm)
        return norm

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.grad

    def slices(self) -> Iterator[Slice]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                state = self.optimizer.state.get(parameter, {})
                yield Slice(
                    name=name,
                    shape=tuple(parameter.shape),
                    start=0,
                    weight=parameter.detach().view(-1),
                    state={key: state[key].view(-1) for key in state if key != "step" and not key.endswith("_scale")},
                    scales={key: state[key] for key in state if key.endswith("_scale")},
                    count=state.get("step"),
                )

    def owns(self, name: str) -> bool:
        """The parameters are dealt to the ranks by size, so that all write alike."""
        if not hasattr(self, "_owner"):
            loads, self._owner = [0] * self.ranks.num, {}
            for parameter_name, parameter in sorted(self.model.named_parameters(), key=lambda item: -item[1].numel()):
                owner = min(range(self.ranks.num), key=loads.__getitem__)
                loads[owner] += parameter.numel()
                self._owner[parameter_name] = owner
        return self._owner[name] == self.ranks.rank

    def make_state(self) -> None:
        idle_step(self.optimizer)

    def slices_written(self) -> None:
        pass

    @contextmanager
    def whole(self) -> Iterator[Any]:
        yield self.model

    def final(self, dtype: torch.dtype | None) -> Any:
        for parameter in self.model.parameters():
            parameter.data = rounded(parameter.data, dtype)
        return self.model

    def scaler_state(self) -> dict[str, Any]:
        return scaler_state(self.scaler)

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        load_scaler_state(self.scaler, state)
