"""Variable-length flash attention over the trees of a pack, without copying a prefix for the branches that share it.

Two calls of PyTorch's kernel are merged:

    1. each prefix and each branch on its own, causal (a tree with one branch is a single causal segment)
    2. the branch rows of a tree against its prefix, without a mask

    lse = log(exp(lse_1) + exp(lse_2)),  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2      at branch rows

The backward pass runs the kernel's backward pass for both calls, each with the *merged* out and lse. From lse the
kernel recomputes exp(scores - lse), and from out the sum rowsum(dout * out). With those over all keys, each call gives
exactly the gradients of its own keys, and its share of the gradient of q.

Shapes: T tokens of a pack, N heads, D head_dim, S segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phi3v.base.errors import InputError
from phi3v.packing.layout import Layout

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 256


class Segments(NamedTuple):
    """Queries `cu_q[i]:cu_q[i + 1]` attend to keys `cu_k[i]:cu_k[i + 1]`: to all of them, or causally."""

    cu_q: Tensor  # [S + 1] int32
    cu_k: Tensor  # [S + 1] int32
    max_q: int
    max_k: int
    causal: bool

    @classmethod
    def of(cls, queries: list[int], keys: list[int], *, causal: bool, device: torch.device) -> Segments:
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(device) for n in (queries, keys))
        return cls(cu_q, cu_k, max(queries), max(keys), causal)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why flash attention is not available on this device in this dtype, or None if it is."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in DTYPES:
        return "it computes in bf16 and fp16 only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an Ampere card or a newer one"
    return None if torch.backends.cuda.is_flash_attention_available() else "this PyTorch was built without it"


def kernel_forward(q: Tensor, k: Tensor, v: Tensor, at: Segments) -> tuple[Tensor, Tensor]:
    """Attention over segments of q, k, v [T, N, D], scaled by D^-1/2 -> out [T, N, D], lse [N, T] float32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, at.causal, False
    )
    return out, lse


def kernel_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v [T, N, D]."""
    seed, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)  # of dropout, which is off
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, at.causal, seed, unused
    )


# -- the two calls -----------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """The second call: token indices of the branch rows and of the prefixes they share, and the segments of both."""

    rows: Tensor
    keys: Tensor
    segments: Segments


class Calls(NamedTuple):
    """The two calls for a pack. `shared` is None if no prefix has more than one branch."""

    own: Segments
    shared: Shared | None


def calls(layout: Layout) -> Calls:
    """The calls for a pack of at least one token."""
    device = layout.position.device
    own: list[int] = []
    rows: list[range] = []
    keys: list[range] = []
    for start, tree in zip(layout.starts, layout.trees, strict=True):
        if len(tree.branches) == 1 or not tree.prefix:
            own += [tree.tokens] if len(tree.branches) == 1 else tree.branches
            continue
        own += [tree.prefix, *tree.branches]
        border = start + tree.prefix
        keys.append(range(start, border))
        rows.append(range(border, start + tree.tokens))
    alone = Segments.of(own, own, causal=True, device=device)
    if not rows:
        return Calls(alone, None)
    index = [torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(device) for spans in (rows, keys)]
    segments = Segments.of([len(s) for s in rows], [len(s) for s in keys], causal=False, device=device)
    return Calls(alone, Shared(index[0], index[1], segments))


def attend(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, found: Calls) -> Tensor:
    """Attention over the trees that `found` was made for -> [T, N, D]. Raises InputError if it is not available."""
    if reason := why_not(q_TND.device, q_TND.dtype):
        raise InputError(f"attention flash_attention_2: {reason}; choose sdpa")
    return _TreeAttention.apply(q_TND, k_TND, v_TND, found)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, found: Calls) -> Tensor:
        out, lse = kernel_forward(q, k, v, found.own)
        if found.shared is not None:
            rows, keys, segments = found.shared
            part = kernel_forward(q[rows], k[keys], v[keys], segments)
            out[rows], lse[:, rows] = merge((out[rows], lse[:, rows]), part)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.found = found
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dq, dk, dv = kernel_backward(dout, q, k, v, out, lse, ctx.found.own)
        if ctx.found.shared is not None:
            rows, keys, segments = ctx.found.shared
            shares = kernel_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], segments)
            for whole, index, share in zip((dq, dk, dv), (rows, keys, keys), shares, strict=True):
                whole[index] += share
        return dq, dk, dv, None


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) [R, N, D], [N, R] over two sets of keys -> over both sets, computed in the precision of lse."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    share_b = (lse_b - lse_a).sigmoid().T[..., None]  # exp(lse_b - lse), so that both shares sum to one for any lse
    out = torch.lerp(out_a.to(lse_a.dtype), out_b.to(lse_a.dtype), share_b)
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
