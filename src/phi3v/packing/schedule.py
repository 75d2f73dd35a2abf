"""Which examples are in which pack, on which rank, in which optimizer step: arithmetic on lengths, nothing else.

A schedule is a pure function of (lengths, settings, seed, epoch). Every rank computes the same schedule and takes its
own part. Invariant: the loss of a step is the sum of weight * cross entropy over the target rows of all its packs on
all ranks, however many packs and ranks there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from phi3v.base.errors import InputError
from phi3v.packing.trees import Floats, Ints, Lengths, PackLimits, PackTree, make_trees

Questions = Literal["all", "expected", "random"]
Weighting = Literal["example", "token"]
PackTrees = tuple[PackTree, ...]
"""The trees of a pack, one forward pass of one rank; may be empty."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """What makes an optimizer step."""

    batch_size: int
    """Examples (`questions="all"`) or pages (`"expected"`, `"random"`) of an optimizer step, over all ranks."""

    questions: Questions = "all"
    """How pages with several questions count. `all`: every question is an example. `expected`: the page counts once,
    its questions averaged. `random`: the page counts once, with one question drawn every epoch; `expected` is the
    expectation of that draw."""

    weighting: Weighting = "example"
    """`example`: mean over the target tokens of each example, then over the examples. `token`: mean over all
    target tokens of the step."""

    limits: PackLimits

    mix: tuple[tuple[int, float], ...] = ()
    """(number of examples, weight) of every data file, in order, where these count differently; empty otherwise."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"--batch-size is {self.batch_size}, it must be at least 1")
        if self.questions == "expected" and self.weighting == "token":
            raise InputError(
                "--questions expected cannot be combined with --weighting token (a ratio of sums is no expectation): "
                "use --weighting example, or --questions all"
            )


class Step(NamedTuple):
    """Counts of one optimizer step over all ranks."""

    number: int
    """Within the epoch, from 0."""
    examples: int
    pages: int
    tokens: int
    """Tokens the decoder runs over, each shared prefix once a tree."""
    crops: int
    packs: int
    """Packs of every rank: equal, so that some may be empty."""
    target_rows: int
    """Target rows: tokens whose next token carries loss."""
    pairs: int
    """Pairs of a query token and a key token that it sees: the work of attention."""


@dataclass(frozen=True)
class EpochSchedule:
    """The steps of one epoch: step k sees the examples `order[bounds[k]:bounds[k + 1]]`, page by page.

    Only the order is held. A step is packed when it is asked for, so that a run resumes at any step at no cost.
    """

    lengths: Lengths = field(repr=False)
    settings: ScheduleSettings
    order: Ints = field(repr=False)
    bounds: Ints = field(repr=False)

    def __len__(self) -> int:
        """Number of steps, the same in every epoch."""
        return len(self.bounds) - 1

    def examples(self, step: int) -> Ints:
        """The examples of a step."""
        return self.order[self.bounds[step] : self.bounds[step + 1]]

    def loss_weights(self, step: int) -> Floats:
        """One per example of a step, in the order of `examples(step)`: the loss weight of each of its target tokens.

        With n target tokens in an example, E examples and S target tokens in the step, and q questions of a page among
        P pages:

            example             1 / (n E)
            example, expected   1 / (n q P)
            token               1 / S
        """
        examples = self.examples(step)
        num_targets = self.lengths.num_targets[examples]
        if self.settings.weighting == "token":
            return np.full(len(examples), 1.0 / num_targets.sum())
        if self.settings.questions == "expected":
            _, page, questions = np.unique(self.lengths.page[examples], return_inverse=True, return_counts=True)
            return 1.0 / (num_targets * questions[page] * len(questions))
        return 1.0 / (num_targets * len(examples))

    def shares(self) -> Floats:
        """[steps] What the mean of each step counts in the mean over the whole schedule, which cuts no page in two."""

        def units(examples: Ints) -> int:
            if self.settings.weighting == "token":
                return int(self.lengths.num_targets[examples].sum())
            expected = self.settings.questions == "expected"
            return len(np.unique(self.lengths.page[examples])) if expected else len(examples)

        counts = [units(self.examples(step)) for step in range(len(self))]
        return np.divide(counts, sum(counts))

    def packs(self, step: int, num_ranks: int = 1) -> tuple[Step, list[list[PackTrees]]]:
        """The counts of a step, and its packs by rank. The examples and their weights do not depend on the ranks."""
        examples = self.examples(step)
        trees = make_trees(examples, self.loss_weights(step), self.lengths, self.settings.limits)
        ranks = pack_trees(trees, self.settings.limits, num_ranks)
        counts = Step(
            number=step,
            examples=len(examples),
            pages=len(np.unique(self.lengths.page[examples])),
            tokens=sum(tree.tokens for tree in trees),
            crops=sum(tree.crops for tree in trees),
            packs=len(ranks[0]),
            target_rows=int(self.lengths.num_targets[examples].sum()),
            pairs=self._pairs(trees),
        )
        return counts, ranks

    def _pairs(self, trees: Sequence[PackTree]) -> int:
        """A prefix is causal; a branch sees its whole prefix, and itself causally."""
        examples = np.array([i for tree in trees for i in tree.examples], dtype=np.int64)
        prefixes = self.lengths.prefix[[tree.examples[0] for tree in trees]]
        prefix, tokens = self.lengths.prefix[examples], self.lengths.tokens[examples]
        branch = tokens - prefix
        return int((prefixes * (prefixes + 1) // 2).sum() + (branch * prefix + branch * (branch + 1) // 2).sum())


def schedule_epoch(lengths: Lengths, settings: ScheduleSettings, *, seed: int, epoch: int) -> EpochSchedule:
    """The steps of an epoch: pages in a new order, each with all its questions (`random`: one of them).

    Every example is seen once an epoch (`random`: every page once), unless `mix` has it otherwise. A step holds exactly
    `batch_size` examples or pages, the last one of an epoch the rest. With `questions="all"` a step border may cut a
    page in two. Raises InputError for an example without a target, and when the batch is larger than the data.
    """
    unanswered = np.flatnonzero(lengths.num_targets == 0)
    if len(unanswered):
        raise InputError(f"training example {unanswered[0] + 1} has no answer token to learn from")
    examples = _drawn(lengths, settings, seed, epoch)
    page = lengths.page[examples]
    unit = np.append(0, page[1:] != page[:-1]).cumsum()  # a page, as often as it is drawn
    questions = np.bincount(unit)
    num_units = len(examples) if settings.questions == "all" else len(questions)
    if settings.batch_size > num_units:
        name = "examples" if settings.questions == "all" else "pages"
        raise InputError(f"--batch-size {settings.batch_size} is larger than the training data ({num_units} {name})")

    units = np.argsort(_random_bits(seed, epoch, "pages", len(questions)), kind="stable")
    place = np.empty_like(units)
    place[units] = np.arange(len(units))
    order = examples[np.argsort(place[unit], kind="stable")]
    ends = questions[units].cumsum()
    if settings.questions == "random":
        draw = _random_bits(seed, epoch, "question", len(questions)) % questions.astype(np.uint64)
        order = order[ends - questions[units] + draw.astype(np.int64)[units]]
    if settings.questions == "expected":
        bounds = np.append(0, ends)[:: settings.batch_size]
    else:
        bounds = np.arange(0, len(order), settings.batch_size)
    if bounds[-1] < len(order):
        bounds = np.append(bounds, len(order))
    return EpochSchedule(lengths, settings, order, bounds)


def _drawn(lengths: Lengths, settings: ScheduleSettings, seed: int, epoch: int) -> Ints:
    """The examples of an epoch, page by page, before the pages are shuffled.

    A file of weight w and n examples (pages, if these are what counts) is gone through in an order of its own, w * n of
    them an epoch, each epoch from where the one before has stopped: all are seen equally often.
    """
    by_page = np.argsort(lengths.page, kind="stable")
    if not settings.mix:
        return by_page
    sizes = np.bincount(lengths.page)
    starts = sizes.cumsum() - sizes

    def of_pages(pages: Ints) -> Ints:
        counts = sizes[pages]
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        places: Ints = np.repeat(starts[pages], counts) + within
        return by_page[places]

    def window(items: Ints, weight: float) -> Ints:
        count = max(1, round(weight * len(items)))
        return items[(epoch * count + np.arange(count)) % len(items)]

    drawn, first = [], 0
    for number, (num_examples, weight) in enumerate(settings.mix):
        pages = np.unique(lengths.page[first : first + num_examples])
        pages = pages[np.argsort(_random_bits(seed, number, "mix", len(pages)), kind="stable")]
        by_example = settings.questions == "all"
        drawn.append(window(of_pages(pages), weight) if by_example else of_pages(window(pages, weight)))
        first += num_examples
    return np.concatenate(drawn)


def schedule_evaluation(
    lengths: Lengths, settings: ScheduleSettings, examples: Ints, pages_at_once: int = 256
) -> EpochSchedule:
    """Some examples once, page by page in their order, in steps of `pages_at_once` pages.

    Their mean by `loss_weights` and `shares` is the objective on all of them. That of `random` is its expectation.
    """
    if settings.questions == "random" and settings.weighting == "example":
        settings = replace(settings, questions="expected")
    return EpochSchedule(lengths, settings, *_by_page(lengths.page[examples], pages_at_once, examples))


def _by_page(page: Ints, pages_at_once: int, items: Ints) -> tuple[Ints, Ints]:
    """`items` page by page, `page` being the page of each, and the bounds of portions of `pages_at_once` pages."""
    order = np.argsort(page, kind="stable")
    ends = np.flatnonzero(np.diff(page[order], append=-1)) + 1
    return items[order], np.concatenate([[0], ends[pages_at_once - 1 : -1 : pages_at_once], [len(order)]])


def _random_bits(seed: int, epoch: int, purpose: Literal["pages", "question", "mix"], count: int) -> np.ndarray:
    """[count] uint64. Raw bits and a stable sort, because NumPy may change what `Generator.permutation` returns."""
    source = np.random.SeedSequence([seed, epoch, ("pages", "question", "mix").index(purpose)])
    return np.random.PCG64(source).random_raw(count)


def schedule_prompts(
    lengths: Lengths, limits: PackLimits, *, max_new_tokens: int, num_ranks: int = 1, pages_at_once: int = 256
) -> Iterator[list[list[PackTrees]]]:
    """Packs by rank for generation: every prompt once over all ranks, each page with all its prompts.

    Pages keep their order, `pages_at_once` of them are packed together. Every branch leaves room for `max_new_tokens`.
    """
    order, bounds = _by_page(lengths.page, pages_at_once, np.arange(len(lengths)))
    for start, end in pairwise(bounds):
        prompts = order[start:end]
        trees = make_trees(prompts, np.zeros(len(prompts)), lengths, limits, growth=max_new_tokens)
        yield pack_trees(trees, limits, num_ranks)


def pack_trees(trees: Sequence[PackTree], limits: PackLimits, num_ranks: int) -> list[list[PackTrees]]:
    """Packs by rank, the same number for every rank, within both limits except for a tree that exceeds one alone.

    Best-fit decreasing finds how few packs are needed. That number, rounded up to a multiple of the ranks, is then
    filled evenly, so that no rank waits for another. Where that does not fit, the packs of best fit stay, and the
    missing packs are empty.
    """
    bins = _best_fit(trees, limits)
    num_packs = max(1, -(-len(bins) // num_ranks)) * num_ranks
    bins = _even_fit(trees, limits, num_packs) or bins
    packs: list[PackTrees] = [tuple(bin.trees) for bin in sorted(bins, key=lambda bin: -bin.load)]
    packs += [()] * (num_packs - len(packs))
    rounds = [packs[start : start + num_ranks] for start in range(0, num_packs, num_ranks)]
    # Packs of a round run side by side and are alike in size; every second round is dealt backwards.
    dealt = [packs_of if number % 2 == 0 else packs_of[::-1] for number, packs_of in enumerate(rounds)]
    return [list(column) for column in zip(*dealt, strict=True)]


class _Bin:
    """A pack being filled. Its load is tokens and crops relative to their limits, in exact integers."""

    def __init__(self, limits: PackLimits) -> None:
        self.limits = limits
        self.trees: list[PackTree] = []
        self.tokens = self.crops = self.load = 0

    def has_room(self, tree: PackTree) -> bool:
        within_tokens = self.tokens + tree.tokens <= self.limits.max_tokens_per_pack
        return not self.trees or (
            self.limits.pack and within_tokens and self.crops + tree.crops <= self.limits.max_crops_per_pack
        )

    def add(self, tree: PackTree) -> None:
        self.trees.append(tree)
        self.tokens += tree.tokens
        self.crops += tree.crops
        self.load += _load(tree, self.limits)


def _load(tree: PackTree, limits: PackLimits) -> int:
    return tree.tokens * limits.max_crops_per_pack + tree.crops * limits.max_tokens_per_pack


def _largest_first(trees: Sequence[PackTree], limits: PackLimits) -> list[PackTree]:
    return sorted(trees, key=lambda tree: -_load(tree, limits))


def _best_fit(trees: Sequence[PackTree], limits: PackLimits) -> list[_Bin]:
    """Each tree into the fullest pack that has room, or a new one."""
    bins: list[_Bin] = []
    for tree in _largest_first(trees, limits):
        best = max((bin for bin in bins if bin.has_room(tree)), key=lambda bin: bin.load, default=None)
        if best is None:
            bins.append(best := _Bin(limits))
        best.add(tree)
    return bins


def _even_fit(trees: Sequence[PackTree], limits: PackLimits, num_packs: int) -> list[_Bin] | None:
    """Each tree into the emptiest pack that has room; None if a tree finds no room in `num_packs` packs."""
    bins = [_Bin(limits) for _ in range(num_packs)]
    for tree in _largest_first(trees, limits):
        emptiest = min((bin for bin in bins if bin.has_room(tree)), key=lambda bin: bin.load, default=None)
        if emptiest is None:
            return None
        emptiest.add(tree)
    return bins
