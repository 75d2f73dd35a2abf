from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.base.errors import InputError
from phi3v.data.split import split

IMAGES = st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=2), min_size=1, max_size=30)


@given(IMAGES, st.floats(0, 0.9), st.integers(0, 5))
def test_no_image_is_on_both_sides(images: list[list[str]], fraction: float, seed: int) -> None:
    try:
        held_out = split(images, fraction, seed)
    except InputError:
        return
    assert held_out == split(images, fraction, seed)
    sides: list[set[str]] = [set(), set()]
    for shown, held in zip(images, held_out, strict=True):
        sides[held].update(shown)
    assert not sides[0] & sides[1]
    assert sum(held_out) <= round(fraction * len(images))
    assert (sum(held_out) > 0) == (fraction > 0)


def test_splits_depend_on_the_seed_and_fill_the_fraction() -> None:
    singles = [[str(k)] for k in range(100)]
    assert sum(split(singles, 0.3, 0)) == 30
    assert split(singles, 0.3, 0) != split(singles, 0.3, 1)
    assert split([[]] * 10, 0.2, 0).count(True) == 2, "texts are not connected"
    with pytest.raises(InputError, match=r"--val-fraction 0.5: images connect 5 examples to 1 groups"):
        split([["a", "b"], ["b", "c"], ["c"], ["c", "d"], ["a"]], 0.5, 0)
