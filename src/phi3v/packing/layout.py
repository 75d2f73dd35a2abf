"""Where trees, prefixes and branches lie in a pack: the contract between the data and the model.

A pack is one flat sequence of tokens. It holds trees laid end to end; a tree is a prefix (the page) followed by its
branches (the examples that share it). A token sees itself and the earlier tokens of its own branch, plus the whole
prefix of its tree; a prefix token sees itself and the prefix before it. Nothing sees another tree or another branch.
Positions of every branch continue from the end of the prefix, so that each example has exactly the positions it would
have alone. The package docstring has a drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Tree(NamedTuple):
    """A prefix of `prefix` tokens and branches of `branches[i]` tokens each; `long`: whether they use the long
    RoPE factors."""

    prefix: int
    branches: tuple[int, ...]
    long: bool

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class Layout:
    """The layout of a pack of T tokens. All attention reads this and nothing else.

    trees      the trees in order; tree k starts at token `starts[k]`
    position   [T] int64, index of the token within its own example (prefix + branch)
    long       [T] bool, whether the token's example uses the long RoPE factors
    branch     [T] int64, number of the branch in the pack, -1 for prefix tokens
    tree       [T] int64, number of the tree in the pack
    """

    trees: tuple[Tree, ...]
    starts: tuple[int, ...]
    position: Tensor
    long: Tensor
    branch: Tensor
    tree: Tensor

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Layout:
        position, branch, starts = [], [], []
        start = number = 0
        for tree in trees:
            starts.append(start)
            position.append(torch.arange(tree.prefix))
            branch.append(torch.full((tree.prefix,), -1))
            for length in tree.branches:
                position.append(torch.arange(tree.prefix, tree.prefix + length))
                branch.append(torch.full((length,), number))
                number += 1
            start += tree.tokens
        tokens = torch.tensor([tree.tokens for tree in trees], dtype=torch.int64)
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(
            trees=tuple(trees),
            starts=tuple(starts),
            position=torch.cat([empty, *position]),
            long=torch.tensor([tree.long for tree in trees], dtype=torch.bool).repeat_interleave(tokens),
            branch=torch.cat([empty, *branch]),
            tree=torch.arange(len(trees)).repeat_interleave(tokens),
        )

    @property
    def tokens(self) -> int:
        return self.position.shape[0]

    def to(self, device: torch.device | str) -> Layout:
        moved = {name: getattr(self, name).to(device) for name in ("position", "long", "branch", "tree")}
        return replace(self, **moved)

    def visible(self, query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
        """[Q, K] bool: may token `query[i]` attend to token `key[j]`? Both are token indices into the pack.

        `window` is the sliding window W of the configuration: keys further back than W positions are hidden.
        """
        q, k = query[:, None], key[None, :]
        same_tree = self.tree[q] == self.tree[k]
        same_branch = (self.branch[k] == -1) | (self.branch[k] == self.branch[q])
        distance = self.position[q] - self.position[k]
        seen = same_tree & same_branch & (distance >= 0)
        return seen if window is None else seen & (distance <= window)
