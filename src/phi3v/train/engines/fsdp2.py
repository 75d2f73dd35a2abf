"""FSDP2: every rank holds a part of every weight, gradient and moment; whole layers exist only while they run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from phi3v.base.ranks import Ranks
from phi3v.model.parts import quantized_weights
from phi3v.packing.pack import Pack
from phi3v.train.engines.engine import EngineSettings, TorchEngine, empty, empty_twin, rounded, unwrap


class Sharded(TorchEngine):
    """Each decoder layer, each layer of a vision tower that learns, and the rest are gathered when they run."""

    def __init__(self, model: Any, ranks: Ranks, settings: EngineSettings) -> None:
        whole = set(quantized_weights(model))  # packed four-bit values are not split
        self.twin = empty_twin(model, shared=whole)
        network = unwrap(model).model
        tower = network.vision_embed_tokens.img_processor.vision_model
        mesh = init_device_mesh(ranks.device.type, (ranks.num,))
        learns = any(p.requires_grad for p in tower.parameters())
        # A frozen tower runs in chunks, whose number differs from rank to rank: it is gathered with the rest.
        for part in [*network.layers, *(tower.encoder.layers[:-1] if learns else []), model]:
            fully_shard(part, mesh=mesh, ignored_params=whole)

        def placed(tensor: Tensor) -> Tensor:  # what learns in float32, the rest in `dtype`, as in `set_precision`
            if not tensor.is_floating_point():
                return tensor.to(ranks.device)
            return tensor.to(ranks.device, torch.float32 if tensor.requires_grad else settings.dtype)

        model._apply(placed)
        super().__init__(model, ranks, settings)

    def learn(self, pack: Pack, *, last: bool) -> Tensor:
        # Gradients are reduced after every pack: kept until the last one, they would not be sharded.
        return self.backward(self.model, pack)

    def start_of(self, parameter: nn.Parameter) -> int:
        rows = -(-parameter.shape[0] // self.ranks.num)  # as torch.chunk deals them
        return min(self.ranks.rank * rows * math.prod(parameter.shape[1:]), parameter.numel())

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
