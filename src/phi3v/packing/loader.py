"""From a schedule to packs, in order, read ahead by worker processes.

Invariant: the packs are the same, bit for bit, whatever `num_workers` is. Reading them touches no global random state.
A worker receives the few examples of its pack with the order to make it, so that the data set is never copied to it.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from phi3v.data.encode import Encoded
from phi3v.data.image import PUBLISHED, ImageRules
from phi3v.packing.pack import Lost, OnBadExample, Pack, make_pack
from phi3v.packing.schedule import EpochSchedule, PackTrees, Step, schedule_prompts
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.packing.workers import Log, packs_by_workers

About = TypeVar("About")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How packs are made."""

    image_token_id: int
    num_crops: int
    rules: ImageRules = PUBLISHED

    num_workers: int = 0
    """Processes that decode images; 0 does it in the training process, best for small images and few cores."""

    packs_ahead: int = 2
    """Packs made ahead of the training, for every worker."""

    pin_memory: bool = False
    """Page-locked memory, for copies to a CUDA device that do not wait."""

    retries: int = 6
    """Times that the images of a pack are tried again while their file system is slow or gone."""

    retry_pause_s: float = 1.0
    """Pause before the first retry; every further one is twice as long: 1 + 2 + 4 + 8 + 16 + 32 = 63 s in all."""

    timeout_s: float = 300.0
    """How long to wait while no worker delivers anything, as when a read hangs; 0 waits forever.
    Must be longer than all retries; shorter than the 10 minutes after which NCCL gives up on a rank that waits."""

    on_bad_example: OnBadExample = "stop"
    """What to do about a training example whose image cannot be read. `skip` makes the pack without it and says so."""

    @property
    def pauses_s(self) -> tuple[float, ...]:
        return tuple(self.retry_pause_s * 2**retry for retry in range(self.retries))


class MicroBatch(NamedTuple):
    """One pack of this rank. After the last pack of a step the optimizer steps."""

    step: Step
    last: bool
    pack: Pack

    @property
    def lost(self) -> tuple[Lost, ...]:
        """The examples that were skipped. Let w be their summed weight over all packs and ranks of the step: loss and
        gradients divided by 1 - w are those of the step without them."""
        return self.pack.lost


class PromptBatch(NamedTuple):
    """A pack of prompts; branch b of the pack is prompt `numbers[b]`."""

    numbers: tuple[int, ...]
    pack: Pack


def training_packs(
    encoded: Sequence[Encoded],
    schedule: EpochSchedule,
    reading: Reading,
    *,
    first_step: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    log: Log = warnings.warn,
) -> Iterator[MicroBatch]:
    """The packs of one rank from a step of an epoch to its end. `log` is called for workers that died.

    Raises InputError, in the turn of its pack, for an image that cannot be read (unless it is to be skipped) and for a
    pack that no worker survives or returns from.
    """

    def orders() -> Iterator[tuple[tuple[Step, bool], PackTrees]]:
        for number in range(first_step, len(schedule)):
            step, ranks = schedule.packs(number, num_ranks)
            for index, trees in enumerate(ranks[rank]):
                yield (step, index == step.packs - 1), trees

    for (step, last), pack in _read(encoded, orders(), reading, log):
        yield MicroBatch(step, last, pack)


def prompt_packs(
    encoded: Sequence[Encoded],
    limits: PackLimits,
    reading: Reading,
    *,
    max_new_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
    log: Log = warnings.warn,
) -> Iterator[PromptBatch]:
    """The packs of one rank for generation, over all ranks every prompt once; every rank gets the same number of packs.

    Raises InputError as `training_packs` does, and for every image that cannot be read: no prompt is skipped.
    """

    def orders() -> Iterator[tuple[tuple[int, ...], PackTrees]]:
        lengths = Lengths.of(encoded)
        for ranks in schedule_prompts(lengths, limits, max_new_tokens=max_new_tokens, num_ranks=num_ranks):
            for trees in ranks[rank]:
                yield tuple(number for tree in trees for number in tree.examples), trees

    for numbers, pack in _read(encoded, orders(), replace(reading, on_bad_example="stop"), log):
        yield PromptBatch(numbers, pack)


class _Order(NamedTuple):
    """What a pack is made from: its trees, and their examples by number."""

    number: int
    trees: PackTrees
    encoded: dict[int, Encoded]
    reading: Reading

    def make(self) -> Pack:
        reading = self.reading
        return make_pack(
            self.trees,
            self.encoded,
            image_token_id=reading.image_token_id,
            num_crops=reading.num_crops,
            rules=reading.rules,
            pauses_s=reading.pauses_s,
            on_bad_example=reading.on_bad_example,
        )

    def __str__(self) -> str:
        """Where its examples are from: "train.jsonl:41, 57, 3"."""
        if not self.encoded:
            return "empty pack"
        first, *others = (example.where for example in self.encoded.values())
        file = first.rpartition(":")[0] + ":"
        more = f" and {len(others) - 49} more" if len(others) > 49 else ""
        return ", ".join([first, *(where.removeprefix(file) for where in others[:49])]) + more


def _read(
    encoded: Sequence[Encoded], orders: Iterable[tuple[About, PackTrees]], reading: Reading, log: Log
) -> Iterator[tuple[About, Pack]]:
    """The packs, in order, each with what `orders` says about it."""
    ordered: deque[About] = deque()

    def sent() -> Iterator[_Order]:
        for number, (about, trees) in enumerate(orders):
            ordered.append(about)
            yield _Order(number, trees, {index: encoded[index] for tree in trees for index in tree.examples}, reading)

    if reading.num_workers:
        packs = packs_by_workers(
            sent(),
            num_workers=reading.num_workers,
            packs_ahead=reading.packs_ahead,
            timeout_s=reading.timeout_s,
            log=log,
        )
    else:
        packs = (order.make() for order in sent())
    for pack in packs:
        yield ordered.popleft(), pack.pin_memory() if reading.pin_memory else pack
