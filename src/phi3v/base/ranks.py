"""The processes of a job, and the small messages between them.

A process started alone is the only rank, and every function here returns at once. Under `torchrun` the ranks find each
other through the environment it sets. Small messages (names, counts, predictions) go over gloo; gradients and weights
over the devices' own network.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from phi3v.base.errors import InputError, RankError
from phi3v.base.hardware import pick_device, quiet_deepspeed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of the job."""

    rank: int = 0
    num: int = 1
    local_rank: int = 0
    """Among the processes of this host."""
    device: torch.device = field(default_factory=pick_device)
    timeout_s: float = 1800.0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    # -- messages: every one begins with a meeting -------------------------------------------------------------------

    def total(self, *values: float, meet: bool = True) -> list[float]:
        """Sums over all ranks, in float64. `meet=False` saves the meeting after a collective that all ranks passed."""
        if self.num == 1:
            return list(values)
        if meet:
            self.meet()
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=_small())
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.total(flag)[0] > 0

    def gather(self, items: Sequence[T]) -> list[list[T]]:
        """Every rank's items, by rank, on every rank."""
        if self.num == 1:
            return [list(items)]
        self.meet()
        found: list[Any] = [None] * self.num
        dist.all_gather_object(found, list(items), group=_small())
        return found

    def first_does(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0; returns its result, or raises its InputError, on every rank."""
        if self.num == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except InputError as error:
                outcome[1] = str(error)
        self.meet()
        dist.broadcast_object_list(outcome, src=0, group=_small())
        result, problem = outcome
        if problem is not None:
            raise InputError(problem)
        return cast(T, result)

    def all_do(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank; if any raises an InputError, all raise the first one."""
        result, failures = None, list[str]()
        try:
            result = work()
        except InputError as error:
            failures = [str(error)]
        for message in chain.from_iterable(self.gather(failures)):
            raise InputError(message)
        return result  # type: ignore[return-value]

    def meet(self) -> None:
        """Waits for all ranks. If some do not come within `timeout_s`, one rank raises a MissingRank that names them.

        The others raise an InputError, so that the error is printed once.
        """
        if self.num == 1:
            return
        started = time.monotonic()
        try:
            dist.monitored_barrier(_small(), timeout=timedelta(seconds=self.timeout_s), wait_all_ranks=True)
        except RuntimeError as error:
            if found := re.search(r"Ranks ([\d, ]+) failed to pass", str(error)):
                missing, gone = [int(rank) for rank in found[1].split(",")], time.monotonic() - started < self.timeout_s
            else:  # rank 0 waits for the others, they only know about it
                missing, gone = [0], "Timed out" not in str(error)
            what = "is gone" if gone else f"hangs: it has not come for {self.timeout_s / 60:g} minutes"
            message = f"rank {', '.join(map(str, missing))} {what}"
            # A rank 0 that is gone has printed why, or torchrun does: it also ends when it finds another one missing.
            if self.rank == (1 if missing == [0] and not gone else 0):
                raise MissingRank(message, missing) from error
            raise InputError(message) from error

    def own(self, items: Iterator[T]) -> Iterator[T]:
        """Items that this rank makes by itself: it alone reports what goes wrong with them."""
        try:
            yield from items
        except InputError as error:
            raise RankError(f"rank {self.rank}: {error}" if self.num > 1 else str(error)) from error


ALONE = Ranks()


class MissingRank(RankError):
    """Some ranks did not come to a meeting: they are gone, or they hang."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def lost_another(error: RuntimeError) -> bool:
    """Whether an error in a collective means no more than that another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def join(timeout_s: float = 1800.0) -> Ranks:
    """This process's rank in the job that `torchrun` started, or alone. Can be called again; `leave` undoes it."""
    num = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device()
    quiet_deepspeed()
    if num == 1:
        return Ranks(timeout_s=timeout_s)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"this host has {torch.cuda.device_count()} GPUs, torchrun started a process for GPU {local_rank + 1}: "
                f"use --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # An engine's collective waits longer than a meeting, so that the meeting is what reports a missing rank.
        wait = timedelta(seconds=timeout_s + 60)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=wait)
    return Ranks(rank=rank, num=num, local_rank=local_rank, device=device, timeout_s=timeout_s)


def leave() -> None:
    """Leaves the job, if there is one."""
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
    _group = None


_group: dist.ProcessGroup | None = None


def _small() -> dist.ProcessGroup:
    """The group for small messages: gloo, beside NCCL; the default one where that is gloo already."""
    global _group
    if _group is None:
        _group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    assert _group is not None
    return _group
