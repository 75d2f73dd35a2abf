"""From crops to embeddings: the CLIP tower, the HD layout and the projector.

Feature of a crop: the output of the second-to-last CLIP layer, class token dropped; 2x2 neighbours merged, 24x24x D
-> 12x12x 4D. An image becomes its local tiles laid out in space (a separator `sub_GN` after every row), then `glb_GN`,
then the global view laid out alike; all of it goes through the projector. The sequence per image therefore has
(ab + 1) 144 + 1 + (a + 1) 12 rows for a grid of a x b tiles.

Only what is needed is computed: never a zero crop, never the last CLIP layer, and one crop instead of two where the
global view *is* the only tile. A frozen tower runs without a graph.

Shapes: C crops, P patches (577 with the class token), D CLIP width, H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable

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
# Crops encoded at once by a frozen tower: enough to fill a device, and a bound on its memory.
FROZEN_CROPS_PER_CALL = 64


class CLIPEmbeddings(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.patch_embedding = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH, bias=False)
        self.position_embedding = nn.Embedding(SIDE * SIDE + 1, dim)

    def forward(self, crops: Tensor) -> Tensor:
        """[C, 3, 336, 336] -> [C, P, D]. The convolution does not overlap, so it is a matrix product over patches."""
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
    def __init__(self, dim: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(dim, heads)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = CLIPMLP(dim, hidden)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, sizes: dict) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPLayer(
                sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"], sizes["layer_norm_eps"]
            )
            for _ in range(sizes["num_hidden_layers"])
        )


class CLIPVisionTransformer(nn.Module):
    """CLIP ViT up to its second-to-last layer. The last layer and `post_layernorm` are kept for the checkpoint only."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        dim = sizes["hidden_size"]
        self.embeddings = CLIPEmbeddings(dim)
        self.pre_layrnorm = nn.LayerNorm(dim, eps=sizes["layer_norm_eps"])  # the published spelling
        self.encoder = CLIPEncoder(sizes)
        self.post_layernorm = nn.LayerNorm(dim, eps=sizes["layer_norm_eps"])
        self.gradient_checkpointing = False
        self.recomputed_layers = sizes["num_hidden_layers"] - 1  # with gradient checkpointing; the first ones
        self._gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def forward(self, crops: Tensor) -> Tensor:
        """[C, 3, 336, 336] normalised -> patch features [C, 576, D]."""
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
    """Only a name: the published keys say `img_processor.vision_model`."""

    def __init__(self, sizes: dict) -> None:
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
        self.frozen_crops_per_call = FROZEN_CROPS_PER_CALL
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(self, crops: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Crops of all images in order, [C, 3, 336, 336]: per image its global view, then its a*b tiles, row by row.

        A 1x1 image has a single crop, which is both its global view and its tile. Returns [rows of all images, H].
        """
        features = self.encode(crops)
        # 2x2 neighbours in the order (0,0) (0,1) (1,0) (1,1)
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
        """Crops [C, 3, 336, 336] -> what CLIP makes of each alone, [C, 576, D]; without a graph if it is frozen."""
        tower = self.img_processor.vision_model
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
        if learns:
            return tower(crops)
        with torch.no_grad():
            return torch.cat([tower(part) for part in crops.split(self.frozen_crops_per_call)])

    def _with_separators(self, grid: Tensor) -> Tensor:
        """[rows, columns, 4D] -> [rows * (columns + 1), 4D], `sub_GN` after every row."""
        separator = self.sub_GN[0].to(grid.dtype).expand(grid.shape[0], 1, -1)
        return torch.cat([grid, separator], dim=1).flatten(0, 1)


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Padded (height, width) in pixels -> tiles (a, b)."""
    return size[0] // CROP, size[1] // CROP


def crops_needed(a: int, b: int) -> int:
    """Crops CLIP must see for a x b tiles: these and the global view, which at 1x1 is the same picture."""
    return 1 if (a, b) == (1, 1) else a * b + 1


def crops_of_tiles(tiles: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """Raw uint8 tiles of all images in order [sum(ab), 3, 336, 336] -> the float32 crops `ImageEmbedding` wants."""
    if not grids:
        return tiles.float()
    with torch.no_grad():
        x = normalize(tiles)
        crops, at = [], 0
        for a, b in grids:
            own = x[at : at + a * b]
            at += a * b
            if (a, b) != (1, 1):
                crops.append(global_view(own, a * CROP, b * CROP)[None])
            crops.append(own)
        return torch.cat(crops)


def crops_of_pixel_values(pixel_values: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """The published batch [n_images, N + 1, 3, 336, 336], zero crops included -> the crops `ImageEmbedding` wants."""
    if pixel_values.ndim != 5 or pixel_values.shape[0] != len(grids):
        raise InputError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, image_sizes has {len(grids)} images: "
            "expected [images, num_crops + 1, 3, 336, 336]"
        )
    for image, (a, b) in enumerate(grids):
        if a * b + 1 > pixel_values.shape[1]:
            raise InputError(
                f"image {image + 1} has {a}x{b} tiles and a global view, "
                f"pixel_values holds {pixel_values.shape[1]} crops"
            )
    return torch.cat([pixel_values[i, : crops_needed(a, b)] for i, (a, b) in enumerate(grids)])
