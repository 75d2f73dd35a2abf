"""Rotary position embeddings with short and long factors ("su" LongRoPE), chosen per example.

    inv_freq_i = 1 / (factor_i * theta^(2i/d)),  angle = position * inv_freq,  cos and sin both times m,
    m = sqrt(1 + ln(max/orig) / ln(orig))  for su,   0.1 ln(max/orig) + 1  for yarn,   1 when max <= orig.

Invariant: the tables are computed in float32 in the published order of operations, for any dtype of the model. The
frequencies are not buffers, so `model.to(torch.bfloat16)` does not round them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phi3v.model.configuration import Phi3VConfig


class LongRope:
    """cos and sin tables for tokens of either regime."""

    def __init__(self, config: Phi3VConfig) -> None:
        dim = config.head_dim
        self.scale = 1.0
        factors = [[1.0] * (dim // 2)] * 2
        if (scaling := config.rope_scaling) is not None:
            factors = [scaling["short_factor"], scaling["long_factor"]]
            ratio = config.max_position_embeddings / config.original_max_position_embeddings
            if ratio > 1 and scaling.get("type") == "yarn":
                self.scale = 0.1 * math.log(ratio) + 1.0
            elif ratio > 1:
                self.scale = math.sqrt(1 + math.log(ratio) / math.log(config.original_max_position_embeddings))
        powers = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim)
        # in float32 and in the order of the published code: 1 / (factor * theta^p)
        self.inv_freq = 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * powers)  # [2, D/2]

    def __call__(self, position: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        """`position` [...] and `long` [...] (bool, broadcastable) -> cos, sin [..., 1, D] in float32 (1: the heads)."""
        if self.inv_freq.device != position.device:
            self.inv_freq = self.inv_freq.to(position.device)
        with torch.autocast(position.device.type, enabled=False):
            angle = position[..., None].float() * self.inv_freq[long.long()]
            angle = torch.cat([angle, angle], dim=-1)[..., None, :]
            return angle.cos() * self.scale, angle.sin() * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of `x` [..., N, D]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin
