"""Which examples look at the same page, and how the examples of a step become trees.

Everything here is arithmetic on lengths: no tokens, no images. Invariant: cutting a page into several trees never
changes the loss; it only computes the prefix again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3v.base.errors import InputError
from phi3v.data.encode import Encoded

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PackLimits:
    """What one pack may hold, and where the RoPE regime changes."""

    max_tokens_per_pack: int
    """Tokens of all trees of a pack together. A tree that has more is a pack by itself. The
    branches of a tree may always take up an eighth of this limit, even where the tree then exceeds it; beyond that the
    page is computed again in another tree."""

    max_crops_per_pack: int
    """Tiles and global views of all images of a pack together. A tree that has more is a pack by itself."""

    original_max: int = 4096
    """An example uses the long RoPE factors when it has more tokens than this."""

    share_prefix: bool = True
    """Compute a page once for all its examples. Without it every example is a tree of its own; the loss is the same."""

    pack: bool = True
    """Several trees in a pack. Without it every tree is a pack of its own; the loss is the same."""

    def __post_init__(self) -> None:
        for name in ("max_tokens_per_pack", "max_crops_per_pack", "original_max"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}, it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of n examples: [n] int64 arrays, 40 MB for a million examples."""

    page: Ints
    """Number of the page of each example, 0 .. num_pages - 1; equal numbers share images and prefix tokens."""

    tokens: Ints
    """Tokens of each example with its image tokens expanded: prefix and branch."""

    prefix: Ints
    """Tokens of the prefix, the same for all examples of a page; 0 without images, or if one follows an answer."""

    crops: Ints
    """Crops of the page, global and local, the same for all examples of a page."""

    num_targets: Ints
    """Tokens that carry loss; 0 for a prompt."""

    @classmethod
    def of(cls, encoded: Iterable[Encoded]) -> Lengths:
        """The lengths of encoded examples; the iterable is read once."""
        rows = ((page, e.tokens, e.prefix_tokens, e.crops, e.num_targets) for page, e in _paged(encoded))
        page, tokens, prefix, crops, num_targets = np.fromiter(rows, dtype=(np.int64, 5)).T.copy()
        return cls(page=page, tokens=tokens, prefix=prefix, crops=crops, num_targets=num_targets)

    def __len__(self) -> int:
        return len(self.page)

    @property
    def num_pages(self) -> int:
        return int(self.page.max()) + 1 if len(self) else 0

    def oversized(self, limits: PackLimits) -> Ints:
        """The examples that exceed a limit alone; their pages get packs of their own."""
        return np.flatnonzero((self.tokens > limits.max_tokens_per_pack) | (self.crops > limits.max_crops_per_pack))


class PackTree(NamedTuple):
    """A tree before it is made: its examples are the branches, in order."""

    examples: tuple[int, ...]
    loss_weights: tuple[float, ...]
    """One per example: the loss weight of each of its target tokens."""
    long: bool
    tokens: int
    crops: int


def group(encoded: Iterable[Encoded]) -> Ints:
    """Number of the page of each example, [n], counted in order of first appearance.

    Two examples of a file share a page when their images, with their sizes, and the token ids up to the last image are
    the same: a file of several may count more than another in an epoch.
    An example without a prefix (text only, or an image that comes after an answer) has a page to itself.
    """
    return np.fromiter((page for page, _ in _paged(encoded)), dtype=np.int64)


def _paged(encoded: Iterable[Encoded]) -> Iterator[tuple[int, Encoded]]:
    """Yields every example with the number of its page."""
    pages: dict[object, int] = {}
    for index, example in enumerate(encoded):
        key: object = index
        if example.prefix > 0:
            file = example.where.rpartition(":")[0]
            names = "\0".join((file, *example.images, "")).encode("utf-8", "surrogatepass")
            shared = names + repr(example.image_sizes).encode() + example.ids[: example.prefix].tobytes()
            key = hashlib.blake2b(shared, digest_size=16).digest()  # not the text itself, which would stay
        yield pages.setdefault(key, len(pages)), example


def make_trees(
    examples: Ints, weights: Floats, lengths: Lengths, limits: PackLimits, *, growth: int = 0
) -> list[PackTree]:
    """The trees of some examples, in the order of the examples.

    One tree a page, except that examples of different RoPE regimes never share one, and that a tree over
    `max_tokens_per_pack` is cut, unless all its branches together have no more than an eighth of that: such a cut would
    save little memory and cost the prefix again. `growth` is what every example may still add when it is a prompt:
    room for it is kept, but the regime is the prompt's own.
    """
    columns = (lengths.page, lengths.tokens, lengths.prefix, lengths.crops)
    rows = zip(examples.tolist(), weights.tolist(), *(column[examples].tolist() for column in columns), strict=True)
    budget = limits.max_tokens_per_pack
    trees: list[PackTree] = []
    newest: dict[tuple[int, bool], int] = {}  # page and regime -> its tree that may still grow
    for example, weight, page, tokens, prefix, crops in rows:
        long = tokens > limits.original_max
        branch = tokens - prefix + growth
        at = newest.get((page, long)) if limits.share_prefix else None
        if at is not None and trees[at].tokens + branch <= max(budget, prefix + budget // 8):
            tree = trees[at]
            trees[at] = tree._replace(
                examples=(*tree.examples, example),
                loss_weights=(*tree.loss_weights, weight),
                tokens=tree.tokens + branch,
            )
        else:
            newest[page, long] = len(trees)
            trees.append(PackTree((example,), (weight,), long, prefix + branch, crops))
    return trees
