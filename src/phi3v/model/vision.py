"""From crops to embeddings: the CLIP tower, the HD layout and the projector.

The features of a crop are the output of the second-to-last CLIP layer without the class token, with 2x2 neighbors
merged, 24 x 24 x D -> 12 x 12 x 4D. An image becomes its local tiles arranged in space (a separator `sub_GN` after
every row), then `glb_GN`, then its global view arranged in the same way; all of this passes through the projector. The
sequence of an image with a grid of a x b tiles therefore has (ab + 1) 144 + 1 + (a + 1) 12 rows.

Only what is needed is computed: no crops of padding, not the last CLIP layer, and one crop instead of two where the
only tile *is* the global view. A frozen tower runs without an autograd graph.

Shapes: C crops, P patches (577 with the class token), D CLIP width, H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phi3v.base.errors import InputError
from phi3v.data.image import CROP, global_view, normalize
from phi3v.model.configuration import Phi3VConfig

SIDE = 24  # patches along a crop
PATCH = 14  # pixels along a patch
PATCHES = SIDE * SIDE + 1  # of a crop, with the class token
MERGED = 12  # rows and columns of a merged crop
# A frozen tower encodes so many crops at once: enough to fill a device, with bounded memory.
FROZEN_CROPS_PER_CALL = 64


class CLIPEmbeddings(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.patch_embedding = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH, bias=False)
        self.position_embedding = nn.Embedding(PATCHES, dim)

    def forward(self, crops: Tensor) -> Tensor:
        """[C, 3, 336, 336] -> [C, P, D]. The convolution has no overlap, so it is computed as a matrix product."""
        count = crops.shape[0]
        weight = self.patch_embedding.weight
        patches = crops.to(weight.dtype).view(count, 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(patches.reshape(count, SIDE * SIDE, -1), weight.flatten(1))
        x = torch.cat([self.class_embedding.to(x.dtype).expand(count, 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class CLIPAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick_gelu


class CLIPLayer(nn.Module):
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        dim, eps = sizes["hidden_size"], sizes["layer_norm_eps"]
        self.self_attn = CLIPAttention(dim, sizes["num_attention_heads"])
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = CLIPMLP(dim, sizes["intermediate_size"])
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(sizes) for _ in range(sizes["num_hidden_layers"]))


class CLIPVisionTransformer(nn.Module):
    """CLIP ViT up to its second-to-last layer. The last layer and `post_layernorm` are only there for checkpoints."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        dim = sizes["hidden_size"]
        self.embeddings = CLIPEmbeddings(dim)
        self.pre_layrnorm = nn.LayerNorm(dim, eps=sizes["layer_norm_eps"])  # the published spelling
        self.encoder = CLIPEncoder(sizes)
        self.post_layernorm = nn.LayerNorm(dim, eps=sizes["layer_norm_eps"])
        self.gradient_checkpointing = False
        self.recomputed_layers = sizes["num_hidden_layers"] - 1  # with gradient checkpointing, the first so many
        self._gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def forward(self, crops: Tensor) -> Tensor:
        """Normalized crops [C, 3, 336, 336] -> patch features [C, 576, D]."""
        x = self.pre_layrnorm(self.embeddings(crops))
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for number, layer in enumerate(self.encoder.layers[:-1]):
            if recomputes and number < self.recomputed_layers:
                assert self._gradient_checkpointing_func is not None
                x = self._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x)
        return x[:, 1:]


class ImageProcessor(nn.Module):
    """A module for the name `img_processor.vision_model` of the published keys."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.vision_model = CLIPVisionTransformer(sizes)


class ImageEmbedding(nn.Module):
    """`model.vision_embed_tokens`: crops of any number of images -> one row per image position."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        merged = 4 * config.clip["hidden_size"]
        self.glb_GN = nn.Parameter(torch.empty(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, merged))
        self.img_processor = ImageProcessor(config.clip)
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(self, crops: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Crops of all images in order [C, 3, 336, 336], and their grids -> [rows of all images, H].

        The crops of an image are its global view and its a*b tiles, row by row. A 1x1 image has one crop, which is both
        its global view and its tile.
        """
        features = self.encode(crops)
        # 2x2 neighbors in the order (0,0) (0,1) (1,0) (1,1)
        features = features.view(-1, MERGED, 2, MERGED, 2, features.shape[-1]).transpose(2, 3)
        features = features.reshape(-1, MERGED, MERGED, 4 * features.shape[-1])
        sequences, at = [], 0
        for a, b in grids:
            views = features[at : at + crops_needed(a, b)]
            at += crops_needed(a, b)
            tiles = views if (a, b) == (1, 1) else views[1:]
            tiles = tiles.unflatten(0, (a, b)).transpose(1, 2).flatten(0, 1).flatten(1, 2)  # [12a, 12b, 4D]
            sequences += [self._with_separators(tiles), self.glb_GN[0].to(tiles.dtype), self._with_separators(views[0])]
        return self.img_projection(torch.cat(sequences))

    def encode(self, crops: Tensor) -> Tensor:
        """Crops [C, 3, 336, 336] -> CLIP features [C, 576, D], without an autograd graph if CLIP is frozen."""
        tower = self.img_processor.vision_model
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters()):
            return tower(crops)
        with torch.no_grad():
            return torch.cat([tower(part) for part in crops.split(FROZEN_CROPS_PER_CALL)])

    def _with_separators(self, grid: Tensor) -> Tensor:
        """[rows, columns, 4D] -> [rows * (columns + 1), 4D], with `sub_GN` after every row."""
        separator = self.sub_GN[0].to(grid.dtype).expand(grid.shape[0], 1, -1)
        return torch.cat([grid, separator], dim=1).flatten(0, 1)


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Padded (height, width) in pixels -> tiles (a, b)."""
    return size[0] // CROP, size[1] // CROP


def crops_needed(a: int, b: int) -> int:
    """Crops that CLIP encodes for a x b tiles: the tiles and the global view, which at 1x1 are the same image."""
    return 1 if (a, b) == (1, 1) else a * b + 1


def crops_of_tiles(tiles: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """Raw uint8 tiles of all images in order [sum(ab), 3, 336, 336] -> float32 crops [C, ...] for `ImageEmbedding`."""
    if not grids:
        return tiles.float()
    crops: list[Tensor] = []
    with torch.no_grad():
        for (a, b), own in zip(grids, normalize(tiles).split([a * b for a, b in grids]), strict=True):
            crops += [own] if (a, b) == (1, 1) else [global_view(own, a * CROP, b * CROP)[None], own]
        return torch.cat(crops)


def crops_of_pixel_values(pixel_values: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """The published batch [images, N + 1, 3, 336, 336] with crops of padding -> crops [C, ...] for `ImageEmbedding`.

    Raises InputError for another shape, and for an image with more tiles than the batch has room for.
    """
    if pixel_values.ndim != 5 or pixel_values.shape[0] != len(grids):
        raise InputError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, image_sizes has {len(grids)} images: "
            "expected [images, num_crops + 1, 3, 336, 336]"
        )
    for image, (a, b) in enumerate(grids):
        if a * b + 1 > pixel_values.shape[1]:
            room = pixel_values.shape[1]
            raise InputError(f"image {image + 1} has {a}x{b} tiles and a global view, pixel_values holds {room} crops")
    return torch.cat([pixel_values[i, : crops_needed(a, b)] for i, (a, b) in enumerate(grids)])
