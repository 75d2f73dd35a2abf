"""Which examples share a page, and how pages become trees."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.packing.trees import Lengths, PackLimits, group, make_trees


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    return str(tmp_path / "a.png"), str(tmp_path / "b.png")


def test_examples_with_the_same_images_and_beginning_share_a_page(fabricate, images):
    a, b = images
    examples = [
        fabricate(3, a, 5, -2, seed=1),
        fabricate(7, -2),
        fabricate(3, b, 5, -2),
        fabricate(3, a, 9, -1, seed=2),  # page of the first
        fabricate(4, a, 5, -2),  # another text before the image
        fabricate(7, -2),  # text only: a page of its own, though it equals another
        fabricate(3, a, b, 5, -2),
        fabricate(3, b, a, 5, -2),  # another order
        fabricate(3, a, b, 2, -2),
        fabricate(3, -1, a, 5, -2),  # its image comes after an answer
        fabricate(3, -1, a, 5, -2),
    ]
    assert group(examples).tolist() == [0, 1, 2, 0, 3, 4, 5, 6, 5, 7, 8]


def test_a_picture_that_was_replaced_meanwhile_is_another_page(fabricate, images):
    """Its prefix has another length: a branch of the one cannot follow the other."""
    one = fabricate(3, images[0], 5, -2)
    assert group([one, replace(one, image_sizes=((336, 672),)), one]).tolist() == [0, 1, 0]


def test_lengths_of_examples(fabricate, images):
    a, b = images
    lengths = Lengths.of([fabricate(3, a, 5, -2), fabricate(7, -1), fabricate(2, -1, a, b, -3)])
    assert len(lengths) == lengths.num_pages == 3
    one = (4 + 1) * 144 + 1 + (2 + 1) * 12  # a square picture with 4 crops is 2x2 tiles
    assert lengths.tokens.tolist() == [3 + one + 7, 8, 2 + 1 + 2 * one + 3]
    assert lengths.prefix.tolist() == [3 + one, 0, 0]
    assert lengths.crops.tolist() == [5, 0, 10]
    assert lengths.num_targets.tolist() == [2, 1, 4]
    assert lengths.tokens.dtype == np.int64
    assert Lengths.of([]).num_pages == 0


def lengths_of(*examples: tuple[int, int, int, int]) -> Lengths:
    """From (page, prefix, branch, crops) of each example."""
    page, prefix, branch, crops = np.array(examples, dtype=np.int64).T
    return Lengths(page=page, tokens=prefix + branch, prefix=prefix, crops=crops, num_targets=np.ones_like(page))


def trees(lengths, *, growth=0, **limits):
    limits = PackLimits(**{"max_tokens_per_pack": 100, "max_crops_per_pack": 10, **limits})
    everything = np.arange(len(lengths))
    return make_trees(everything, everything / 10, lengths, limits, growth=growth)


def test_a_page_is_one_tree_in_the_order_of_its_examples():
    page, other = (0, 20, 5, 3), (1, 0, 7, 0)
    first, second = trees(lengths_of(page, other, page, page))
    assert first == ((0, 2, 3), (0.0, 0.2, 0.3), False, 35, 3)
    assert second == ((1,), (0.1,), False, 7, 0)


def test_a_tree_over_the_budget_is_cut_and_pays_its_prefix_again():
    parts = trees(lengths_of(*[(0, 60, 15, 3)] * 5))
    assert [part.examples for part in parts] == [(0, 1), (2, 3), (4,)]
    assert [part.tokens for part in parts] == [90, 90, 75]
    assert [part.crops for part in parts] == [3, 3, 3]
    assert [weight for part in parts for weight in part.loss_weights] == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_an_example_over_the_budget_is_a_tree_of_its_own():
    parts = trees(lengths_of((0, 60, 15, 3), (0, 60, 70, 3), (0, 60, 15, 3)))
    assert [part.examples for part in parts] == [(0,), (1,), (2,)]


def test_a_page_as_long_as_the_budget_is_computed_once_for_an_eighth_of_it_in_questions():
    parts = trees(lengths_of(*[(0, 150, 4, 3)] * 8))
    assert [part.examples for part in parts] == [(0, 1, 2), (3, 4, 5), (6, 7)]  # 12 of 100 tokens
    assert [part.tokens for part in parts] == [162, 162, 158]
    parts = trees(lengths_of(*[(0, 150, 30, 3)] * 2))
    assert [part.examples for part in parts] == [(0,), (1,)]
    for prefix in (88, 96, 99):  # nearly as long, it is no different
        (part, *_) = trees(lengths_of(*[(0, prefix, 4, 3)] * 8))
        assert part.examples == (0, 1, 2)
    (part, *_) = trees(lengths_of(*[(0, 150, 1, 3)] * 8), growth=3)
    assert (part.examples, part.tokens) == ((0, 1, 2), 162)


def test_a_tree_has_one_rope_regime():
    page = [(0, 20, branch, 1) for branch in (10, 11, 5, 12)]
    short, long = trees(lengths_of(*page), original_max=30)
    assert (short.examples, short.long) == ((0, 2), False)  # 30 tokens are not more than 30
    assert (long.examples, long.long) == ((1, 3), True)


def test_prompts_keep_room_to_grow_but_their_own_regime():
    page = [(0, 20, 10, 1)] * 3
    (together,) = trees(lengths_of(*page), growth=16, original_max=30)
    assert (together.tokens, together.long) == (20 + 3 * 26, False)
    assert len(trees(lengths_of(*page), growth=17)) == 2


def test_without_sharing_every_example_is_a_tree():
    parts = trees(lengths_of(*[(0, 20, 5, 3)] * 3), share_prefix=False)
    assert [part.examples for part in parts] == [(0,), (1,), (2,)]
    assert [part.tokens for part in parts] == [25, 25, 25]


def test_examples_that_alone_exceed_a_budget_are_known():
    lengths = lengths_of((0, 0, 100, 0), (1, 0, 101, 0), (2, 5, 5, 10), (3, 5, 5, 11))
    assert lengths.oversized(PackLimits(max_tokens_per_pack=100, max_crops_per_pack=10)).tolist() == [1, 3]


@pytest.mark.parametrize("name", ["max_tokens_per_pack", "max_crops_per_pack", "original_max"])
def test_limits_are_positive(name):
    flag = name.replace("_", "-")
    with pytest.raises(InputError, match=f"--{flag} is 0"):
        PackLimits(**{"max_tokens_per_pack": 1, "max_crops_per_pack": 1, name: 0})
