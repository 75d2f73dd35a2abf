"""The decoder layers: pre-norm, fused qkv, rotary positions, SwiGLU.

    x += o_proj(attend(rotate(q), rotate(k), v)),  q, k, v = qkv_proj(RMS(x))
    x += down(up * silu(gate)),                    gate, up = gate_up_proj(RMS(x))

A layer does not know the layout of its tokens: it works on [..., H] and passes q, k, v to `attend`. With `rows`, only
these tokens continue (the last layer needs no others), while all tokens provide keys and values.

A layer consists of two halves around `attend`, each of which can be compiled. `attend` is not compiled: it calls
kernels, for trees that differ from pack to pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phi3v.model.attention import Attend
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.rope import rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back, then times the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """The projections before attention, `heads`, and after it, `o_proj`. It has no forward."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_size = config.num_attention_heads * config.head_dim
        self.kv_size = config.num_key_value_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, self.q_size + 2 * self.kv_size, bias=False)
        self.o_proj = nn.Linear(self.q_size, config.hidden_size, bias=False)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> q (only at `rows`), k, v [..., heads, D]; q and k are rotated."""
        q, k, v = self._project(x, rows)
        cos, sin = (table.to(q.dtype) for table in rope)
        q_rope = (cos, sin) if rows is None else (cos[rows], sin[rows])
        return rotate(q, *q_rope), rotate(k, cos, sin), v

    def _project(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> q, k, v [..., heads, D]; q only at `rows`."""
        sizes = [self.q_size, self.kv_size, self.kv_size]
        if rows is not None and type(self.qkv_proj) is nn.Linear:  # an adapter around it needs the whole input
            w_q, w_kv = self.qkv_proj.weight.split([self.q_size, 2 * self.kv_size])
            q, (k, v) = F.linear(x[rows], w_q), F.linear(x, w_kv).split(sizes[1:], dim=-1)
        else:
            q, k, v = self.qkv_proj(x).split(sizes, dim=-1)
            q = q if rows is None else q[rows]
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))


class MLP(nn.Module):
    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))


class Phi3VDecoderLayer(nn.Module):
    def __init__(self, config: Phi3VConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, rows: Tensor | None = None) -> Tensor:
        """[..., H] -> [..., H], or [R, H] with `rows` [R]. `rope` is (cos, sin), each [..., 1, D]."""
        # Compiled for training only: in generation every step has new shapes.
        before, after = self.compiled if self.compiled and self.training else HALVES
        q, k, v = before(self, x, rope, rows)
        return after(self, x, attend(self.layer, q, k, v, rows), rows)


def before_attention(
    layer: Phi3VDecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[..., H] -> q, k, v [..., heads, D]."""
    return layer.self_attn.heads(layer.input_layernorm(x), rope, rows)


def after_attention(layer: Phi3VDecoderLayer, x: Tensor, attended: Tensor, rows: Tensor | None) -> Tensor:
    """The input of the layer [..., H] and the output of `attend` [..., N, D] -> [..., H]."""
    x = (x if rows is None else x[rows]) + layer.resid_dropout(layer.self_attn.o_proj(attended.flatten(-2)))
    return x + layer.resid_dropout(layer.mlp(layer.post_attention_layernorm(x)))


# Functions that take the layer, not methods: a deep copy of a compiled layer then runs on its own weights.
HALVES = (before_attention, after_attention)
