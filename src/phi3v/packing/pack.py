"""A pack: trees laid end to end as one flat sequence, with their images, targets and loss weights. One forward pass.

Invariant: a pack holds exactly what its examples hold one by one. Every example keeps its tokens, its positions, its
targets and its loss weights; only the tokens of a shared prefix are stored once.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi3v.base.errors import InputError
from phi3v.data.encode import Encoded
from phi3v.data.image import CROP, PUBLISHED, ImageRules, hd_transform, load_image, num_image_tokens, tiles_of
from phi3v.packing.layout import Layout, Tree
from phi3v.packing.trees import PackTree

Held = TypeVar("Held", "Pack", Layout)
OnBadExample = Literal["stop", "skip"]

MAY_PASS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTCONN, errno.ENODEV, errno.EAGAIN, errno.EREMOTEIO}
    | {errno.ETIMEDOUT, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
)
"""Errors of a network file system that is slow or gone for a while; a vanished mount reports missing files."""


class Lost(NamedTuple):
    """An example that is left out of its pack because an image of its page cannot be read."""

    id: str
    where: str
    reason: str
    weight: float
    """The sum of its rows' loss weights; those of a whole step add up to 1."""

    def __str__(self) -> str:
        return f"{self.where}: example {self.id}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Pack:
    """T tokens of B examples with R target rows. May be empty: T = B = R = 0.

    input_ids     [T] int64; the places of an image hold the image token's id, `num_image_tokens(h, w)` times
    layout        where trees, prefixes and branches lie; the branches are the examples, in order
    tiles         [n, 3, 336, 336] uint8, the local crops of all images; the model makes the global views
    image_sizes   [images, 2] int64, padded (h, w) in pixels of every image, in the order of the tokens
    target_rows   [R] int64, the token before each target; of a prompt, its last token
    targets       [R] int64, the next token (0 for a prompt)
    loss_weights  [R] float32, the loss is the sum of weight * cross entropy (0 for a prompt)
    branch        [R] int64, the example of each row, as its number in the pack
    ids           [B] the examples' ids
    lost          the examples that should be here and are not; none unless `on_bad_example="skip"`
    """

    input_ids: Tensor
    layout: Layout
    tiles: Tensor
    image_sizes: Tensor
    target_rows: Tensor
    targets: Tensor
    loss_weights: Tensor
    branch: Tensor
    ids: tuple[str, ...]
    lost: tuple[Lost, ...] = ()

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def crops(self) -> int:
        """Tiles and global views."""
        return self.tiles.shape[0] + self.image_sizes.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pack:
        return _changed(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Pack:
        """The pack in page-locked memory, for `to("cuda", non_blocking=True)`."""
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
    rules: ImageRules = PUBLISHED,
    pauses_s: Iterable[float] = (),
    on_bad_example: OnBadExample = "stop",
) -> Pack:
    """The pack of some scheduled trees; `encoded[i]` is example i of the schedule.

    An example without targets is a prompt: its one row is its last token. Every image file is read once.

    While an image cannot be read for a reason that may pass, it is tried again after each of `pauses_s`. All images of
    the pack share these pauses, so that a pack takes no longer than their sum. An image that still cannot be read, or
    has changed since it was encoded, is an InputError naming example and file; with `on_bad_example="skip"` the
    examples of its trees are left out and listed in `lost`.
    """
    images = _Images(num_crops, rules, pauses_s)
    layout, shown, ids = [], list[Tensor](), []
    image_sizes: list[tuple[int, int]] = []
    lost: list[Lost] = []
    rows, targets, weights, branch = [], [], [], []
    names: list[str] = []
    end = 0
    for tree in trees:
        start = end
        branches: list[int] = []
        first = encoded[tree.examples[0]]
        prefix = first.prefix_tokens
        try:
            shown += [images.read(*image) for image in zip(first.images, first.image_sizes, strict=True)]
        except InputError as error:
            examples = [encoded[index] for index in tree.examples]
            lost += [
                Lost(example.id, example.where, str(error), weight * example.num_targets)
                for example, weight in zip(examples, tree.loss_weights, strict=True)
            ]
            if on_bad_example == "stop":
                raise InputError(str(lost[0])) from error
            continue
        image_sizes += first.image_sizes
        for index, weight in zip(tree.examples, tree.loss_weights, strict=True):
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
        tiles=torch.cat([torch.zeros(0, 3, CROP, CROP, dtype=torch.uint8), *shown]),
        image_sizes=torch.tensor(image_sizes, dtype=torch.int64).reshape(-1, 2),
        target_rows=_joined(rows, torch.int64),
        targets=_joined(targets, torch.int64),
        loss_weights=_joined(weights, torch.float32),
        branch=_joined(branch, torch.int64),
        ids=tuple(names),
        lost=tuple(lost),
    )


def _expanded(example: Encoded, image_token_id: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ids with every image's id repeated, and the places of the target tokens among them."""
    repeats = np.ones(len(example.ids), dtype=np.int64)
    repeats[example.ids == image_token_id] = [num_image_tokens(h, w) for h, w in example.image_sizes]
    return np.repeat(example.ids, repeats), np.flatnonzero(np.repeat(example.loss_mask, repeats))


class _Images:
    """The images of a pack: every file is read once, whether that succeeds or not."""

    def __init__(self, num_crops: int, rules: ImageRules, pauses_s: Iterable[float]) -> None:
        self._num_crops, self._rules = num_crops, rules
        self._pauses_s = iter(pauses_s)
        self._read: dict[str, Tensor | str] = {}

    def read(self, image: str, size: tuple[int, int]) -> Tensor:
        """The tiles of an image file, uint8 [n, 3, 336, 336]. Raises InputError unless its padded size is `size`."""
        if image not in self._read:
            self._read[image] = self._tiles_or_reason(image, size)
        read = self._read[image]
        if isinstance(read, str):
            raise InputError(read)
        return read

    def _tiles_or_reason(self, image: str, size: tuple[int, int]) -> Tensor | str:
        waited = 0.0
        while True:
            try:
                hd = hd_transform(load_image(image, self._rules), self._num_crops)
            except InputError as error:
                pause = next(self._pauses_s, None) if _may_pass(error) else None
                if pause is None:
                    return f"{error}; tried again for {waited:.0f} s" if waited else str(error)
                time.sleep(pause)
                waited += pause
            else:
                if hd.shape[:2] == size:
                    return tiles_of(hd)
                return f"{image}: now {hd.shape[:2]} pixels padded, it was {size} when the data was read"


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error, or its cause, comes from the file system and not from the file."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in MAY_PASS:
            return True
        error = error.__context__
    return False


def _joined(pieces: Sequence[NDArray[Any]], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces)).to(dtype) if pieces else torch.zeros(0, dtype=dtype)
