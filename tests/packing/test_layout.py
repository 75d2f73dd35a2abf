"""Positions, branches, regimes and visibility of a layout, against loops that follow the definition word by word."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3v import packing
from phi3v.packing.layout import Layout, Tree

trees = st.lists(
    st.builds(
        Tree,
        prefix=st.integers(0, 4),
        branches=st.lists(st.integers(0, 4), max_size=3).map(tuple),
        long=st.booleans(),
    ),
    max_size=4,
)


def tokens_of(trees: list[Tree]) -> list[dict]:
    tokens, branch_number = [], 0
    for number, tree in enumerate(trees):
        here = {"tree": number, "long": tree.long}
        tokens += [{**here, "branch": -1, "position": position} for position in range(tree.prefix)]
        for length in tree.branches:
            tokens += [{**here, "branch": branch_number, "position": tree.prefix + step} for step in range(length)]
            branch_number += 1
    return tokens


def sees(query: dict, key: dict, window: int | None) -> bool:
    if query["tree"] != key["tree"]:
        return False
    if key["branch"] not in (-1, query["branch"]):
        return False  # another branch; or a prefix token looking into a branch
    distance = query["position"] - key["position"]
    return distance >= 0 and (window is None or distance <= window)


@given(trees=trees, window=st.none() | st.integers(0, 5))
def test_a_layout_is_what_its_trees_say(trees, window):
    layout, tokens = Layout.of(trees), tokens_of(trees)
    assert layout.tokens == len(tokens) == sum(tree.tokens for tree in trees)
    for name in ("tree", "branch", "position", "long"):
        assert getattr(layout, name).tolist() == [token[name] for token in tokens]
    assert layout.starts == tuple(sum(tree.tokens for tree in trees[:number]) for number in range(len(trees)))
    every = torch.arange(len(tokens))
    expected = [[sees(query, key, window) for key in tokens] for query in tokens]
    assert layout.visible(every, every, window).tolist() == expected


def test_one_tree_by_hand():
    layout = Layout.of([Tree(prefix=2, branches=(2, 1), long=False), Tree(prefix=0, branches=(2,), long=True)])
    assert layout.position.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert layout.branch.tolist() == [-1, -1, 0, 0, 1, 2, 2]
    assert layout.starts == (0, 5)
    assert layout.long.tolist() == [False] * 5 + [True] * 2
    every = torch.arange(7)
    assert layout.visible(every, every).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_some_rows_see_what_all_rows_see():
    layout = Layout.of([Tree(prefix=3, branches=(2, 4), long=False)])
    every, rows = torch.arange(9), torch.tensor([8, 3, 4])
    assert torch.equal(layout.visible(rows, every), layout.visible(every, every)[rows])


def test_an_empty_layout():
    layout = Layout.of([])
    assert layout.tokens == 0
    assert layout.trees == layout.starts == ()
    assert layout.visible(torch.arange(0), torch.arange(0)).shape == (0, 0)


@pytest.mark.parametrize("name", ["position", "long", "branch", "tree"])
def test_a_layout_moves_whole(name):
    assert getattr(Layout.of([Tree(1, (2,), True)]).to("meta"), name).device.type == "meta"


def test_the_drawing_in_the_package_docstring_is_true():
    """Its expression, its numbers and its table."""
    text = packing.__doc__ or ""
    expression = re.search(r"`(Layout\.of\(.*?\))` lays", text)
    assert expression
    layout = eval(expression[1], {"Layout": Layout, "Tree": Tree})
    rows = {
        name: re.findall(r"-?\d+", line) for name, line in re.findall(r"^    (\w+)  +(-?\d.*)$", text, re.MULTILINE)
    }
    ends = [int(token) for token in rows["token"]]
    assert [layout.position[end].item() for end in ends] == [int(position) for position in rows["position"]]
    assert [layout.branch[end].item() for end in ends[::2]] == [int(branch) for branch in rows["branch"]]
    assert layout.tokens == ends[-1] + 1
    assert f"{layout.tokens} tokens instead of {3 * 317 + 12 + 9 + 14}" in text

    blocks = [slice(start, end + 1) for start, end in zip(ends[::2], ends[1::2], strict=True)]
    table = [
        line.split()[-5:] for line in text.splitlines() if re.match(r"    (page|branch) \d  +(causal|all|-)", line)
    ]
    every = torch.arange(layout.tokens)
    visible = layout.visible(every, every)
    for query, words in zip(blocks, table, strict=True):
        for key, word in zip(blocks, words, strict=True):
            seen = visible[query, key]
            expected = {
                "causal": torch.ones_like(seen).tril(),
                "all": torch.ones_like(seen),
                "-": torch.zeros_like(seen),
            }
            assert torch.equal(seen, expected[word])
