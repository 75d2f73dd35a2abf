"""Every rank holds the whole model: one rank alone, or PyTorch's DistributedDataParallel."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phi3v.base.ranks import Ranks
from phi3v.model.parts import set_precision
from phi3v.packing.pack import Pack
from phi3v.train.engines.engine import EngineSettings, TorchEngine, rounded


class Replicated(TorchEngine):
    """Gradients are averaged over the ranks; the optimizer runs on every rank alike."""

    def __init__(self, model: Any, ranks: Ranks, settings: EngineSettings) -> None:
        model = model.to(ranks.device)  # before it is widened: the host's memory would hold a wide copy a process
        set_precision(model, settings.dtype, learning=settings.learning)
        super().__init__(model, ranks, settings)
        self.network: nn.Module = model
        if ranks.num > 1:  # buckets as gradients save a copy of them
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def learn(self, pack: Pack, *, last: bool) -> Tensor:
        waits = not last and isinstance(self.network, DistributedDataParallel)
        with self.network.no_sync() if waits else nullcontext():  # type: ignore[operator]
            return self.backward(self.network, pack)

    def saves(self, name: str) -> bool:
        return self._savers[name] == self.ranks.rank

    @functools.cached_property
    def _savers(self) -> dict[str, int]:
        """The rank that saves each parameter: dealt by size, so that all ranks write alike."""
        loads, savers = [0] * self.ranks.num, {}
        for name, parameter in sorted(self.model.named_parameters(), key=lambda item: -item[1].numel()):
            savers[name] = min(range(self.ranks.num), key=loads.__getitem__)
            loads[savers[name]] += parameter.numel()
        return savers

    def final(self, dtype: torch.dtype | None) -> Any:
        for parameter in self.model.parameters():
            parameter.data = rounded(parameter.data, dtype)
        return self.model
