"""FSDP2: every rank holds a part of every weight, gradient and moment; whole layers exist only while they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from phi3v.base.ranks import Ranks
from phi3v.model.parts import quantised_weights
from phi3v.packing.pack import Pack
from phi3v.train.engines.engine import (
    Slice,
    StepResult,
    bare,
    build_scaler,
    empty,
    empty_twin,
    idle_step,
    load_scaler_state,
    rounded,
    same_work_on_every_rank,
    scaler_state,
)


class Sharded:
    """Each decoder layer, each layer of a vision tower that learns, and the rest are gathered when they run."""

    def __init__(
        self,
        model: Any,
        ranks: Ranks,
        *,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        max_grad_norm: float,
        dtype: torch.dtype,
    ) -> None:
        same_work_on_every_rank(model)
        self.model, self.ranks, self.max_grad_norm, self.dtype = model, ranks, max_grad_norm, dtype
        whole = set(quantised_weights(model))  # packed four-bit values are not split
        self.twin = empty_twin(model, kept=whole)
        network = bare(model).model
        tower = network.vision_embed_tokens.img_processor.vision_model
        mesh = init_device_mesh(ranks.device.type, (ranks.num,))
        learns = any(p.requires_grad for p in tower.parameters())
        # A frozen tower runs in chunks, their number differs from rank to rank: it stays with the rest.
        for part in [*network.layers, *(tower.encoder.layers[:-1] if learns else []), model]:
            fully_shard(part, mesh=mesh, ignored_params=whole)

        def placed(tensor: Tensor) -> Tensor:  # what learns in float32, the rest in `dtype`, as `set_precision` says
            if not tensor.is_floating_point():
                return tensor.to(ranks.device)
            return tensor.to(ranks.device, torch.float32 if tensor.requires_grad else dtype)

        model._apply(placed)
        self.optimizer = make_optimizer(model)
        self.scaler = build_scaler(ranks.device, dtype)

    def learn(self, pack: Pack, *, last: bool) -> Tensor:
        # Gradients are reduced after every pack: kept whole until the last one they would not be sharded at all.
        with torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(pack=pack, learn=True).loss
        self.scaler.scale(loss * self.ranks.num).backward()
        return loss.detach()

    def step(self) -> StepResult:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if finite := math.isfinite(value):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(value, not finite)

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in self.model.named_parameters():
            yield name, None if parameter.grad is None else _local(parameter.grad)

    def slices(self) -> Iterator[Slice]:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            state = self.optimizer.state.get(parameter, {})
            rows = -(-parameter.shape[0] // self.ranks.num)  # as torch.chunk deals them
            yield Slice(
                name=name,
                shape=tuple(parameter.shape),
                start=min(self.ranks.rank * rows * math.prod(parameter.shape[1:]), parameter.numel()),
                weight=_local(parameter.detach()).view(-1),
                state={key: _local(value).view(-1) for key, value in state.items() if key != "step"},
                count=_local(state["step"]) if state else None,
            )

    def owns(self, name: str) -> bool:
        return True

    def make_state(self) -> None:
        idle_step(self.optimizer)

    def slices_written(self) -> None:
        pass

    @contextmanager
    def whole(self) -> Iterator[Any]:
        try:
            yield self.final(None)
        finally:
            empty(self.twin)

    def final(self, dtype: torch.dtype | None) -> Any:
        twins = dict(self.twin.named_parameters())
        parameter: Any
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                twins[name].data = rounded(parameter.full_tensor().detach(), dtype)
        return self.twin

    def scaler_state(self) -> dict[str, Any]:
        return scaler_state(self.scaler)

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        load_scaler_state(self.scaler, state)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
