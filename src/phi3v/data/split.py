"""Divide examples into training and validation so that no image is on both sides, and find images that are."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from networkx.utils import UnionFind

from phi3v.base.errors import InputError
from phi3v.data.image import LOOK, ImageInfo

MAX_CLASSES = 101
"""Answers are classes if there are at most so many, each with two groups of examples on average."""

SAME_LOOK = 2
"""Largest difference in a byte of the looks of one image in two formats or sizes."""


def split(images: Sequence[Sequence[object]], answers: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """Which examples are held out, given the images and the answer of each.

    Examples that are connected by equal images stay together. Such groups are taken at random as long as they fit in
    the fraction and, where the answers are few, in that of each answer, of which one group always fits and one is left.
    Raises InputError if nothing is left on one of the sides.
    """
    if fraction == 0:
        return [False] * len(images)
    groups = _groups(images)
    if len(set(answers)) > min(MAX_CLASSES, len(groups) // 2):
        answers = [""] * len(answers)
    generator = random.Random(seed)
    left = round(fraction * len(images))
    given, held = Counter(answers), Counter[str]()

    def fits(answer: str, number: int) -> bool:
        total = held[answer] + number
        return total < given[answer] and (not held[answer] or total <= math.ceil(fraction * given[answer]))

    held_out = [False] * len(images)
    for group in sorted(groups, key=lambda _: generator.random()):
        of_group = Counter(answers[example] for example in group)
        if len(group) <= left and all(fits(*pair) for pair in of_group.items()):
            left -= len(group)
            held += of_group
            for example in group:
                held_out[example] = True
    if len(set(held_out)) < 2:
        raise InputError(f"--val-fraction {fraction}: images connect {len(images)} examples to {len(groups)} groups")
    return held_out


def _groups(images: Sequence[Sequence[object]]) -> list[list[int]]:
    """The examples that common images connect, in the order of the first of each group."""
    examples, shown_by = UnionFind(range(len(images))), dict[object, int]()
    for example, shown in enumerate(images):
        examples.union(example, *(shown_by.setdefault(image, example) for image in shown))
    return sorted(map(sorted, examples.to_sets()))


def twins(images: Sequence[ImageInfo], others: Collection[ImageInfo]) -> list[str]:
    """For each image, whether the others hold "the same file", "nearly the same image", or neither: ""."""
    digests = {other.digest for other in others}
    every = b"".join({other.look for other in others})
    looks = np.frombuffer(every, np.uint8).reshape(-1, LOOK).astype(np.int16)
    looks = looks[looks.sum(axis=1).argsort()]
    sums = looks.sum(axis=1)

    def looks_like_another(image: ImageInfo) -> bool:
        look = np.frombuffer(image.look, np.uint8).astype(np.int16)
        first, last = np.searchsorted(sums, look.sum() + np.array([-1, 1]) * (SAME_LOOK * LOOK + 0.5))
        return bool((abs(looks[first:last] - look) <= SAME_LOOK).all(axis=1).any())

    return [
        "the same file" if image.digest in digests else "nearly the same image" if looks_like_another(image) else ""
        for image in images
    ]
