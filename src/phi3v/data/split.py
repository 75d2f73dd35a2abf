"""Divide examples into training and validation so that no image is on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence

from networkx.utils import UnionFind

from phi3v.base.errors import InputError


def split(images: Sequence[Sequence[str]], fraction: float, seed: int) -> list[bool]:
    """Which examples are held out, given the images of each.

    Examples that are connected by common images stay together. Such groups are taken at random as long as they fit in
    the fraction. Raises InputError if nothing is left on one of the sides.
    """
    if fraction == 0:
        return [False] * len(images)
    groups = _groups(images)
    generator = random.Random(seed)
    left = round(fraction * len(images))
    held_out = [False] * len(images)
    for group in sorted(groups, key=lambda _: generator.random()):
        if len(group) <= left:
            left -= len(group)
            for example in group:
                held_out[example] = True
    if len(set(held_out)) < 2:
        raise InputError(f"--val-fraction {fraction}: images connect {len(images)} examples to {len(groups)} groups")
    return held_out


def _groups(images: Sequence[Sequence[str]]) -> list[list[int]]:
    """The examples that common images connect, in the order of the first of each group."""
    examples, shown_by = UnionFind(range(len(images))), dict[str, int]()
    for example, shown in enumerate(images):
        examples.union(example, *(shown_by.setdefault(image, example) for image in shown))
    return sorted(map(sorted, examples.to_sets()))
