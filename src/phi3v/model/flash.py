"""Variable-length flash attention over the trees of a pack; no prefix is copied for the branches that share it.

    1. every prefix and every branch by itself, causal (a tree of one branch is a single causal segment)
    2. the branch rows of a tree against its prefix, all of them visible

    lse = log(exp(lse_1) + exp(lse_2)),  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2      at branch rows

The backward pass runs the kernel's own twice, each time with the *merged* out and lse. From lse the kernel recomputes
exp(scores - lse), from out the sum rowsum(dout * out): with those of all keys, each call gives exactly its keys' share
of the gradients, and the shares of q add up.

Shapes: T tokens of a pack, N heads, D head_dim, S segments.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phi3v.base.errors import InputError
from phi3v.packing.layout import Layout

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 256


class Segments(NamedTuple):
    """Queries `cu_q[i]:cu_q[i + 1]` see keys `cu_k[i]:cu_k[i + 1]`: all, or (as many as queries) those before them."""

    cu_q: Tensor  # [S + 1] int32
    cu_k: Tensor  # [S + 1] int32
    max_q: int
    max_k: int
    causal: bool

    @classmethod
    def of(cls, queries: list[int], keys: list[int], *, causal: bool, device: torch.device) -> Segments:
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(device) for n in (queries, keys))
        return cls(cu_q, cu_k, max(queries), max(keys), causal)


class Kernel(NamedTuple):
    """What computes segments of q, k, v [T, N, D], scaled by D^-1/2. `lse` is [N, T] float32, natural logarithm."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    """(q, k, v, segments) -> out [T, N, D], lse."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(dout, q, k, v, out, lse, segments) -> dq, dk, dv."""


# -- kernels -----------------------------------------------------------------------------------------------------------


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash attention cannot be had here, in words; None if it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in DTYPES:
        return "it computes in bf16 and fp16 only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an Ampere card or a newer one"
    return None if find_kernel() else "this PyTorch was built without it, and flash-attn is not installed"


@functools.cache
def find_kernel() -> Kernel | None:
    """PyTorch's own kernel, or that of the flash-attn package (2.7 or newer)."""
    if torch.backends.cuda.is_flash_attention_available():
        return Kernel("PyTorch's kernel", _torch_forward, _torch_backward)
    if importlib.util.find_spec("flash_attn") is not None:
        return Kernel(f"flash-attn {metadata.version('flash_attn')}", _package_forward, _package_backward)
    return None


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, at: Segments) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, at.causal, False
    )
    return out, lse


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    seed, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)  # of a dropout that there is not
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, at.causal, seed, unused
    )


def _package_settings(q: Tensor, at: Segments) -> dict[str, Any]:
    settings = {"cu_seqlens_q": at.cu_q, "cu_seqlens_k": at.cu_k, "max_seqlen_q": at.max_q, "max_seqlen_k": at.max_k}
    return {**settings, "dropout_p": 0.0, "softmax_scale": q.shape[-1] ** -0.5, "causal": at.causal}


def _package_forward(q: Tensor, k: Tensor, v: Tensor, at: Segments) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(q, k, v, **_package_settings(q, at))
    return out, lse


def _package_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        **_package_settings(q, at),
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


# -- the two calls -----------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """The second call: token indices of the branch rows and of the prefixes they share, and how they go together."""

    rows: Tensor
    keys: Tensor
    segments: Segments


class Calls(NamedTuple):
    """What is to be computed for a pack. No `shared`: no prefix has more than one branch."""

    own: Segments
    shared: Shared | None


def calls(layout: Layout) -> Calls:
    """The two calls for a pack of at least one token."""
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


def attend(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, found: Calls, kernel: Kernel | None = None) -> Tensor:
    """Attention over the trees that `found` was made for -> [T, N, D]. Raises InputError where there is no kernel."""
    if kernel is None:
        if reason := why_not(q_TND.device, q_TND.dtype):
            raise InputError(f"attention flash_attention_2: {reason}; choose sdpa")
        kernel = find_kernel()
    return _TreeAttention.apply(q_TND, k_TND, v_TND, found, kernel)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, found: Calls, kernel: Kernel) -> Tensor:
        out, lse = kernel.forward(q, k, v, found.own)
        if found.shared is not None:
            rows, keys, segments = found.shared
            part = kernel.forward(q[rows], k[keys], v[keys], segments)
            out[rows], lse[:, rows] = merge((out[rows], lse[:, rows]), part)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.found, ctx.kernel = found, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dq, dk, dv = ctx.kernel.backward(dout, q, k, v, out, lse, ctx.found.own)
        if ctx.found.shared is not None:
            rows, keys, segments = ctx.found.shared
            dq_rows, dk_keys, dv_keys = ctx.kernel.backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], segments
            )
            for whole, index, share in ((dq, rows, dq_rows), (dk, keys, dk_keys), (dv, keys, dv_keys)):
                whole[index] += share
        return dq, dk, dv, None, None


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) [R, N, D], [N, R] over two sets of keys -> over both, weighed in the precision of lse."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    share_b = (lse_b - lse_a).sigmoid().T[..., None]  # exp(lse_b - lse); the shares add up to one, however large lse is
    out = torch.lerp(out_a.to(lse_a.dtype), out_b.to(lse_a.dtype), share_b)
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
