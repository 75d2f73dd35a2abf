from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.base.errors import InputError
from phi3v.data.image import LOOK, ImageInfo
from phi3v.data.split import split, twins

IMAGES = st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=2), min_size=1, max_size=30)


@given(IMAGES, st.floats(0, 0.9), st.integers(0, 5), st.integers(1, 4))
def test_no_image_is_on_both_sides(images: list[list[str]], fraction: float, seed: int, num_answers: int) -> None:
    answers = [str(number % num_answers) for number in range(len(images))]
    try:
        held_out = split(images, answers, fraction, seed)
    except InputError:
        return
    assert held_out == split(images, answers, fraction, seed)
    sides: list[set[str]] = [set(), set()]
    for shown, held in zip(images, held_out, strict=True):
        sides[held].update(shown)
    assert not sides[0] & sides[1]
    assert sum(held_out) <= round(fraction * len(images))
    assert (sum(held_out) > 0) == (fraction > 0)


def test_splits_depend_on_the_seed_and_fill_the_fraction() -> None:
    singles, texts = [[str(k)] for k in range(100)], [str(k) for k in range(100)]
    assert sum(split(singles, texts, 0.3, 0)) == 30
    assert split(singles, texts, 0.3, 0) != split(singles, texts, 0.3, 1)
    assert split([[]] * 10, texts[:10], 0.2, 0).count(True) == 2, "texts are not connected"
    with pytest.raises(InputError, match=r"--val-fraction 0.5: images connect 5 examples to 1 groups"):
        split([["a", "b"], ["b", "c"], ["c"], ["c", "d"], ["a"]], texts[:5], 0.5, 0)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_its_share_on_both_sides(seed: int) -> None:
    answers = ["often"] * 70 + ["sometimes"] * 26 + ["rarely"] * 3 + ["once"]
    random.Random(seed).shuffle(answers)
    held_out = split([[k] for k in range(100)], answers, 0.1, seed)
    held = Counter(answer for answer, held in zip(answers, held_out, strict=True) if held)
    assert held.total() == 10
    assert 6 <= held["often"] <= 7
    assert held["sometimes"] >= 2
    assert held["rarely"] <= 1
    assert held["once"] == 0


def test_two_copies_of_every_image_of_a_class_leave_one_pair_to_train_on() -> None:
    answers = [color for color in ("red", "green", "blue") for _ in range(4)]
    held_out = split([[k // 2] for k in range(12)], answers, 0.34, 0)
    assert held_out.count(True) == 4
    assert set(Counter(answer for answer, held in zip(answers, held_out, strict=True) if held).values()) == {2}


def image_of(digest: int, look: list[int]) -> ImageInfo:
    return ImageInfo((9, 9), 1, False, 0.0, 0.0, digest, bytes(look))


def test_twins_are_the_same_file_or_look_the_same() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(2, 254, (200, LOOK))
    others = [image_of(digest, look.tolist()) for digest, look in enumerate(looks)]
    nearly = looks[7] + rng.integers(-2, 3, LOOK)
    other = looks[9].copy()
    other[3] += 3 if other[3] < 128 else -3
    images = [image_of(5, [0] * LOOK), image_of(1000, nearly.tolist()), image_of(1001, other.tolist())]
    assert twins(images, others) == ["the same file", "nearly the same image", ""]
    assert twins(images, []) == ["", "", ""]
    assert twins([], others) == []
