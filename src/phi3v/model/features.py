"""What a frozen CLIP tower makes of a picture, kept: computed once, looked up from then on.

Its invariant: the features of a picture are computed from its crops alone, in a call of their own, and rounded to the
precision that the projector multiplies in. So they are the same bits whatever pack the picture stands in, whatever is
kept already, and whoever computed them: a run with a cache resumes bit for bit, from a cold cache as well.

A picture goes by its content, and what else the features depend on by a digest of its own, so that a cache cannot be
out of date: another picture, tower or precision has another name.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from phi3v.base.errors import InputError, RankError
from phi3v.base.files import make_folder, write_among_others
from phi3v.model.phi3v import Phi3VForCausalLM
from phi3v.model.vision import SIDE, crops_needed, crops_of_tiles

LAYOUT = 1
"""Of crops and features; to be counted up when they, or the normalisation of the pixels, are made another way."""

RUBBISH_S = 24 * 3600.0
"""Age at which a file that somebody began to write is not going to be finished."""


class FeatureCache:
    """The features of pictures, in memory or in a folder, which processes and runs may share.

    tower         what `digest_of_tower` says
    dtype         precision the features are kept in: that of the arithmetic, so that nothing is lost
    folder        of safetensors files, one a picture; None keeps them in memory
    on_full_disk  a file that cannot be written. stop: a RankError. continue: keep no more, and `tell`
    """

    def __init__(
        self,
        tower: str,
        dtype: torch.dtype,
        folder: Path | None = None,
        *,
        on_full_disk: Literal["stop", "continue"] = "stop",
        tell: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.dtype, self.folder = dtype, folder
        self._name = hashlib.sha256(f"{tower} {dtype} {LAYOUT}".encode()).hexdigest()[:16]
        self._on_full_disk, self._tell, self._full = on_full_disk, tell, False
        self._memory: dict[str, Tensor] = {}
        self._found = 0
        if folder is not None:
            make_folder(folder)
            for file in folder.glob(".*.unfinished"):
                with suppress(OSError):  # others clean here, too
                    if file.stat().st_mtime < time.time() - RUBBISH_S:
                        file.unlink()

    def features(
        self,
        tiles: Tensor,
        grids: Sequence[tuple[int, int]],
        digests: Sequence[str],
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """[C, 576, D] in `dtype`: features of all crops of some pictures, found or computed.

        Tiles and grids as for `crops_of_tiles`, digests of the pictures as `phi3v.data.image.digest_of` makes them;
        `compute` runs the tower over crops [c, 3, 336, 336].
        """
        parts, at = [], 0
        for (a, b), digest in zip(grids, digests, strict=True):
            kept = self._find(digest, crops_needed(a, b))
            if kept is None:
                kept = compute(crops_of_tiles(tiles[at : at + a * b], [(a, b)])).to(self.dtype).contiguous()
                self._keep(digest, kept)
            else:
                self._found += a * b + 1
            parts.append(kept.to(tiles.device))
            at += a * b
        return torch.cat(parts)

    def crops_found(self) -> int:
        """How many crops, local and global, did not have to be computed since this was last asked."""
        found, self._found = self._found, 0
        return found

    def _find(self, digest: str, crops: int) -> Tensor | None:
        """What is kept; None for what is not, or is damaged."""
        if self.folder is None:
            return self._memory.get(digest)
        try:
            tensors = load_file(self._file(digest))
            kept, total = tensors["features"], tensors["sum"]
        except (OSError, SafetensorError, KeyError):
            return None
        whole = kept.dtype == self.dtype and kept.shape[:2] == (crops, SIDE * SIDE) and torch.equal(_sum(kept), total)
        return kept if whole else None

    def _keep(self, digest: str, features: Tensor) -> None:
        features = features.cpu()
        if self.folder is None:
            self._memory[digest] = features
        elif not self._full:
            try:
                content = save({"features": features, "sum": _sum(features)})
                write_among_others(self._file(digest), content)
            except InputError as error:
                if self._on_full_disk == "stop":
                    raise RankError(f"{error} (go on without the cache: --vision-cache none)") from error
                self._full = True
                self._tell(f"{error}; the vision cache keeps no further pictures")

    def _file(self, digest: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest}-{self._name}.safetensors"


def digest_of_tower(model: Phi3VForCausalLM) -> str:
    """SHA-256 of all that the tower computes with: its weights, four-bit ones with their scales, and its settings.

    For a model as it is loaded, before an engine rounds or splits it.
    """
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    unused = (f"encoder.layers.{len(tower.encoder.layers) - 1}.", "post_layernorm.")
    found = hashlib.sha256(json.dumps(model.config.clip, sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        if not name.startswith(unused):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def feature_bytes(sizes: Iterable[tuple[int, int]], width: int, dtype: torch.dtype) -> int:
    """Bytes of the features of pictures with these grids (a, b), for a tower of this width."""
    return sum(crops_needed(a, b) for a, b in sizes) * SIDE * SIDE * width * dtype.itemsize


def _sum(features: Tensor) -> Tensor:
    """Of the bits, two bytes at a time: a hole or a changed value in a file shows. int64, a scalar."""
    return features.view(torch.int16).sum()
