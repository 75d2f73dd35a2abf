"""How much memory a run will need, by part: arithmetic on sizes, before anything is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from phi3v.adamw import BYTES
from phi3v.config import Optimizer, Run
from phi3v.errors import InputError
from phi3v.hardware import available_memory
from phi3v.loss import ROWS_PER_CHUNK
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.features import feature_bytes
from phi3v.model.vision import PATCHES, grid_of
from phi3v.parallel import Parallel

# What the ranks of an engine share out.
SHARED: dict[Parallel, tuple[str, ...]] = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}


def estimate(
    model: nn.Module,
    config: Phi3VConfig,
    *,
    tokens: int,
    crops: int,
    rows: int,
    bytes_per_value: int,
    recompute: int,
    engine: Parallel = "ddp",
    num_ranks: int = 1,
    optimizer: Optimizer = "adamw",
) -> dict[str, float]:
    """GB by part for the largest pack: `tokens` and `crops` run through the layers, `rows` get logits.

    `optimizer` says what a weight that learns takes, with its gradient and both moments. Activations are what a layer
    keeps for its backward pass: 8 H + 3 F values a token in the decoder, 8 D + 2 F a patch in CLIP (H, D widths, F the
    MLP's); the first `recompute` layers (of the decoder, then of CLIP) keep their input alone. `engine` says what
    `num_ranks` share out. An estimate: the allocator and kernels come on top.
    """
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(
        p.numel() * (bytes_per_value if p.is_floating_point() else p.element_size())
        for p in model.parameters()
        if not p.requires_grad
    )
    each, clip = BYTES[optimizer], config.clip
    decoder_layer = (8 * config.hidden_size + 3 * config.intermediate_size) * tokens
    clip_layer = (8 * clip["hidden_size"] + 2 * clip["intermediate_size"]) * crops * PATCHES
    vision_learns = any(p.requires_grad for name, p in model.named_parameters() if "img_processor" in name)
    clip_layers = clip["num_hidden_layers"] - 1 if vision_learns else 0
    kept = _kept(config.num_hidden_layers, recompute, decoder_layer, config.hidden_size * tokens)
    in_clip = max(0, recompute - config.num_hidden_layers)
    kept += _kept(clip_layers, in_clip, clip_layer, clip["hidden_size"] * crops * PATCHES)
    # Autocast keeps a copy, in the precision of the arithmetic, of every wider weight it has met.
    copies = bytes_per_value if engine == "ddp" and bytes_per_value < each.weight else 0
    parts = {
        "weights": (each.weight + copies) * learn + frozen,
        "gradients": each.gradient * learn,
        "optimizer": each.moments * learn,
        "activations": bytes_per_value * kept,
        "logits": 3 * 4 * min(rows, ROWS_PER_CHUNK) * config.vocab_size,
    }
    gigabytes = {name: size / 1e9 / (num_ranks if name in SHARED[engine] else 1) for name, size in parts.items()}
    return {**gigabytes, "total": sum(gigabytes.values())}


def _kept(layers: int, recompute: int, whole: int, at_start: int) -> int:
    """Values that are held at the end of the forward pass, when memory is fullest.

    When the first layers are computed again, all that later ones held is free; if there are none, it needs room of its
    own.
    """
    again = min(layers, recompute)
    return (layers - again) * whole + again * at_start + (whole if 0 < layers == again else 0)


def layers_to_recompute(free_gb: float, most: int, needed: Callable[[int], float]) -> int:
    """The fewest layers, up to `most`, such that `needed(layers)` GB fit into `free_gb`; `most` if nothing fits."""
    return next((layers for layers in range(most) if needed(layers) <= free_gb), most)


@dataclass(frozen=True, kw_only=True)
class CacheRoom:
    """What a cache of the vision tower's features (`--vision-cache`) takes once it holds every picture."""

    pictures: int
    size: int
    """Bytes."""
    folder: Path | None
    """None: in memory."""
    processes: int
    """Of this host."""

    @classmethod
    def of(cls, run: Run, sizes: Mapping[str, tuple[int, int]], config: Phi3VConfig, dtype: torch.dtype) -> CacheRoom:
        """For pictures with these padded (h, w), by path; a picture that has two paths counts twice."""
        return cls(
            pictures=len(sizes),
            size=feature_bytes(map(grid_of, sizes.values()), config.clip["hidden_size"], dtype),
            folder=run.vision_cache_folder,
            processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )

    def check(self) -> None:
        """Raises InputError if this host has less room than that."""
        takes = f"takes up to {_amount(self.size)} for {self.pictures:,} pictures"
        if self.folder is None:
            each = f" in each of {self.processes} processes" if self.processes > 1 else ""
            if self.size * self.processes > (free := available_memory()):
                has = f"this host has {_amount(free)} of memory available"
                raise InputError(f"--vision-cache memory {takes}{each}, {has}: choose disk or none")
        elif self.size - self.held > (free := shutil.disk_usage(_existing(self.folder)).free):
            there = f", of which {_amount(self.held)} are there" if self.held else ""
            raise InputError(
                f"--vision-cache disk {takes} in {self.folder}{there}, {_amount(free)} are free: choose another "
                "--vision-cache-dir, or none"
            )

    @property
    def held(self) -> int:
        """Bytes that the folder holds already, whatever for."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) if self.folder else 0

    def __str__(self) -> str:
        where = f"in {self.folder}" if self.folder else "in memory"
        each = " of every process" if self.folder is None and self.processes > 1 else ""
        there = f" ({_amount(self.held)} are there)" if self.held else ""
        return f"up to {_amount(self.size)} for {self.pictures:,} pictures, {where}{each}{there}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one around it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _amount(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
