"""The loss on examples that are not learnt: the objective of the training, page by page, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from phi3v.base.console import progress_bar, say
from phi3v.base.ranks import ALONE, Ranks
from phi3v.base.stopping import Stopped
from phi3v.data.encode import Encoded
from phi3v.packing.loader import Reading, training_packs
from phi3v.packing.schedule import EpochSchedule


@torch.no_grad()
def objective(
    model: Any,
    encoded: Sequence[Encoded],
    schedule: EpochSchedule,
    *,
    reading: Reading,
    dtype: torch.dtype,
    title: str = "validation loss",
    progress: bool = True,
    ranks: Ranks = ALONE,
    leave_off: Callable[[], bool] = lambda: False,
) -> float:
    """The weighted mean that `schedule` (of `schedule_evaluation`) makes of the examples' cross entropies, in nats.

    Every rank computes its share and returns the whole. `leave_off` is asked before every pack. Raises Stopped, on all
    ranks, when it returns true on any, and InputError for an image that cannot be read.
    """
    device = next(model.parameters()).device
    packs = training_packs(
        encoded, schedule, replace(reading, on_bad_example="stop"), rank=ranks.rank, num_ranks=ranks.num, log=say
    )
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    shares = schedule.shares().tolist()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with progress_bar(title, len(schedule.order), "examples", show=progress, summary=False) as advance, mixed:
            for micro in ranks.own(packs):
                if ranks.any(leave_off()):
                    raise Stopped
                pack = micro.pack.to(device, non_blocking=True)
                loss += shares[micro.step.number] * model(pack=pack, learn=True).loss
                advance(micro.step.examples * micro.last)
    finally:
        model.train(was_training)
    return ranks.total(float(loss))[0]
