"""A pack: trees laid end to end as one flat sequence, with their pictures, labels and weights. One forward pass.

Its invariant: nothing in a pack says more or less than its examples one by one. Every example keeps its tokens, its
positions, its targets and its loss weights; only the tokens of a shared prefix stand there once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi3v.data.chat import Encoded
from phi3v.data.image import CROP, hd_transform, load_image, num_image_tokens, tiles_of
from phi3v.data.tree import PackTree
from phi3v.errors import InputError
from phi3v.layout import Layout, Tree

Held = TypeVar("Held", "Pack", Layout)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """T tokens of B examples with R supervised rows. May be empty: T = B = R = 0.

    input_ids     [T] int64; the places of an image hold the image token's id, `num_image_tokens(h, w)` times
    layout        where trees, prefixes and branches lie; the branches are the examples, in order
    tiles         [n, 3, 336, 336] uint8, the local crops of all pictures; the model makes the global ones
    image_sizes   [images, 2] int64, padded (h, w) in pixels of every picture, in the order of the tokens
    rows          [R] int64, tokens whose next token in their branch is a target; of a prompt, its last token
    targets       [R] int64, the next token (0 for a prompt)
    weights       [R] float32, the loss is the sum of weight * cross entropy (0 for a prompt)
    branch        [R] int64, the example of each row, as its number in the pack
    ids           [B] the examples' ids
    """

    input_ids: Tensor
    layout: Layout
    tiles: Tensor
    image_sizes: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    branch: Tensor
    ids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def crops(self) -> int:
        """Crops the vision tower sees, local and global."""
        return self.tiles.shape[0] + self.image_sizes.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pack:
        return _changed(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Pack:
        """The pack in page-locked memory, for `to("cuda", non_blocking=True)`. The DataLoader calls this by name."""
        return _changed(self, lambda tensor: tensor.pin_memory())


def _changed(held: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """The same pack or layout with every tensor changed."""
    values = {field.name: getattr(held, field.name) for field in fields(held)}
    changed: dict[str, Tensor | Layout] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            changed[name] = change(value)
        elif isinstance(value, Layout):
            changed[name] = _changed(value, change)
    return replace(held, **changed)  # type: ignore[arg-type]


def make_pack(
    trees: Sequence[PackTree],
    encoded: Sequence[Encoded] | Mapping[int, Encoded],
    *,
    image_token_id: int,
    num_crops: int,
) -> Pack:
    """The pack of some planned trees; `encoded[i]` is example i of the plan.

    An example without supervised tokens is a prompt: its one row is its last token. Every image file is read once.
    Raises InputError, naming example and file, for an image that cannot be read or has changed since it was encoded.
    """
    pictures: dict[str, Tensor] = {}
    layout, tiles, image_sizes, ids = [], [], [], []
    rows, targets, weights, branch = [], [], [], []
    names: list[str] = []
    end = 0
    for tree in trees:
        start = end
        branches: list[int] = []
        first = encoded[tree.examples[0]]
        prefix = first.prefix_tokens
        for image, size in zip(first.images, first.image_sizes, strict=True):
            if image not in pictures:
                pictures[image] = _read_tiles(image, size, num_crops, first.where)
            tiles.append(pictures[image])
            image_sizes.append(size)
        for index, weight in zip(tree.examples, tree.weights, strict=True):
            example = encoded[index]
            tokens, targets_at = _expanded(example, image_token_id)
            if not branches:
                ids.append(tokens[:prefix])
                end += prefix
            ids.append(tokens[prefix:])
            if len(targets_at):
                targets.append(tokens[targets_at])
            else:
                targets_at, weight = np.array([len(tokens)]), 0.0
                targets.append(np.zeros(1, dtype=np.int32))
            # The token before a target lies in the branch, or, before the first token of a branch, ends the prefix.
            rows.append(np.where(targets_at > prefix, end + targets_at - prefix, start + prefix) - 1)
            weights.append(np.full(len(targets_at), weight))
            branch.append(np.full(len(targets_at), len(names)))
            names.append(example.id)
            branches.append(len(tokens) - prefix)
            end += branches[-1]
        layout.append(Tree(prefix=prefix, branches=tuple(branches), long=tree.long))
    return Pack(
        input_ids=_joined(ids, torch.int64),
        layout=Layout.of(layout),
        tiles=torch.cat([torch.zeros(0, 3, CROP, CROP, dtype=torch.uint8), *tiles]),
        image_sizes=torch.tensor(image_sizes, dtype=torch.int64).reshape(-1, 2),
        rows=_joined(rows, torch.int64),
        targets=_joined(targets, torch.int64),
        weights=_joined(weights, torch.float32),
        branch=_joined(branch, torch.int64),
        ids=tuple(names),
    )


def _expanded(example: Encoded, image_token_id: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ids with every image's id repeated, and the places of the supervised tokens among them."""
    repeats = np.ones(len(example.ids), dtype=np.int64)
    repeats[example.ids == image_token_id] = [num_image_tokens(h, w) for h, w in example.image_sizes]
    return np.repeat(example.ids, repeats), np.flatnonzero(np.repeat(example.supervised, repeats))


def _read_tiles(image: str, size: tuple[int, int], num_crops: int, where: str) -> Tensor:
    try:
        hd = hd_transform(load_image(image), num_crops)
        if hd.shape[:2] != size:
            raise InputError(f"{image}: now {hd.shape[:2]} pixels padded, it was {size} when the data was read")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return tiles_of(hd)


def _joined(pieces: Sequence[NDArray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces)).to(dtype) if pieces else torch.zeros(0, dtype=dtype)
