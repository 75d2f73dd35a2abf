"""From a plan to packs, in order, read ahead by worker processes.

Its invariant: the packs are the same, bit for bit, whatever `num_workers` is, and reading them touches no global random
state. A worker gets the few examples of its pack with the order to make it, so the data set is never copied to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from phi3v.data.chat import Encoded
from phi3v.data.pack import Pack, make_pack
from phi3v.data.plan import EpochPlan, PackPlan, Step, plan_prompts
from phi3v.data.tree import Lengths, PackLimits
from phi3v.errors import InputError

About = TypeVar("About")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How packs are made."""

    image_token_id: int
    num_crops: int

    num_workers: int = 0
    """Processes that decode images; 0 does it in the training process, best for small images and few cores."""

    packs_ahead: int = 2
    """Packs every worker makes ahead of the training."""

    pin_memory: bool = False
    """Page-locked memory, for copies to a CUDA device that do not wait."""


class MicroBatch(NamedTuple):
    """One pack of this rank. After the last pack of a step the optimizer steps."""

    step: Step
    last: bool
    pack: Pack


class PromptBatch(NamedTuple):
    """A pack of prompts; branch b of the pack is prompt `numbers[b]`."""

    numbers: tuple[int, ...]
    pack: Pack


def training_packs(
    encoded: Sequence[Encoded],
    plan: EpochPlan,
    reading: Reading,
    *,
    first_step: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[MicroBatch]:
    """The packs of one rank from a step of an epoch to its end. Raises InputError for an image that cannot be read."""

    def orders() -> Iterator[tuple[tuple[Step, bool], PackPlan]]:
        for number in range(first_step, len(plan)):
            step, ranks = plan.packs(number, num_ranks)
            for index, trees in enumerate(ranks[rank]):
                yield (step, index == step.packs - 1), trees

    for (step, last), pack in _read(encoded, orders(), reading):
        yield MicroBatch(step, last, pack)


def prompt_packs(
    encoded: Sequence[Encoded],
    limits: PackLimits,
    reading: Reading,
    *,
    max_new_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[PromptBatch]:
    """The packs of one rank for generation, over all ranks every prompt once; every rank gets the same number of packs.

    Raises InputError for an image that cannot be read.
    """

    def orders() -> Iterator[tuple[tuple[int, ...], PackPlan]]:
        lengths = Lengths.of(encoded)
        for ranks in plan_prompts(lengths, limits, max_new_tokens=max_new_tokens, num_ranks=num_ranks):
            for trees in ranks[rank]:
                yield tuple(number for tree in trees for number in tree.examples), trees

    for numbers, pack in _read(encoded, orders(), reading):
        yield PromptBatch(numbers, pack)


_Order = tuple[PackPlan, dict[int, Encoded]]
"""What a worker is sent: the trees of a pack, and their examples by number."""


@dataclass(frozen=True)
class _Packs(Dataset[Pack | InputError]):
    """The data set of all possible packs: its index is the order to make one."""

    reading: Reading

    def __getitem__(self, order: _Order) -> Pack | InputError:
        trees, encoded = order
        try:
            return make_pack(
                trees, encoded, image_token_id=self.reading.image_token_id, num_crops=self.reading.num_crops
            )
        except InputError as error:
            # Handed back as a value: the DataLoader would wrap it, and its one line would become a page.
            return error


def _read(
    encoded: Sequence[Encoded], orders: Iterable[tuple[About, PackPlan]], reading: Reading
) -> Iterator[tuple[About, Pack]]:
    """The packs, in order, each with what `orders` says about it."""
    ordered: deque[About] = deque()

    def sampler() -> Iterator[_Order]:
        for about, trees in orders:
            ordered.append(about)
            yield trees, {index: encoded[index] for tree in trees for index in tree.examples}

    loader = DataLoader(
        _Packs(reading),
        sampler=sampler(),
        batch_size=None,
        num_workers=reading.num_workers,
        prefetch_factor=reading.packs_ahead if reading.num_workers else None,
        pin_memory=reading.pin_memory,
        generator=torch.Generator(),  # its own, or every epoch would draw from the global one and dropout would differ
    )
    for pack in loader:
        if isinstance(pack, InputError):
            raise pack
        yield ordered.popleft(), pack
