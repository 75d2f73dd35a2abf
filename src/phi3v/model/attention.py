"""Attention of the decoder: one `attend(layer, q, k, v, rows)` for packs and for caches, with several backends.

Shapes: T tokens of a pack, R query rows, B batch, L query length, K key length, N heads, M key/value heads, D head_dim.

`PackedAttention` computes the attention of a pack from its layout. All backends compute the same function; the dense
mask ("eager") is the reference they are tested against:

    sdpa               one call per prefix and one for all branches of a tree; keys are slices of the pack, and a prefix
                       is copied only for branches after the first MAX_BRANCH_TOKENS_PER_CALL tokens
    eager              the dense [T, T] mask, softmax in float32
    flex_attention     a block mask built once per pack
    flash_attention_2  two variable-length calls per pack, merged by log-sum-exp (`phi3v.model.flash`); with dropout, or
                       if an example is longer than the sliding window, sdpa is used instead

The last two leave the last layer, in which a few rows attend to all keys, to sdpa.

`CachedAttention` is for `generate`: a padded batch over a transformers cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from phi3v.model import flash
from phi3v.packing.layout import Layout, Tree

BACKENDS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
# Branches of a tree share a masked call up to this many tokens (or the length of the prefix): beyond that the masked
# blocks between branches would cost more than another copy of the prefix.
MAX_BRANCH_TOKENS_PER_CALL = 1024


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, /) -> Tensor:
        """q [..., N, D] and k, v [..., M, D]. Queries of `rows` (all tokens if None) against all keys -> shape of q."""


class Call(NamedTuple):
    """One SDPA call: the number of queries that come next in the tree, and their keys. No mask means causal."""

    queries: int
    keys: slice | Tensor
    mask: Tensor | None


def calls(layout: Layout, window: int | None = None) -> list[list[Call]]:
    """The SDPA calls that compute the attention of each tree, in the order of its tokens."""
    trees = zip(layout.starts, layout.trees, strict=True)
    return [_calls_of_tree(layout, start, tree, window) for start, tree in trees]


def _calls_of_tree(layout: Layout, start: int, tree: Tree, window: int | None) -> list[Call]:
    device = layout.position.device

    def mask(queries: slice, keys: slice) -> Tensor:
        query, key = (torch.arange(start + s.start, start + s.stop, device=device) for s in (queries, keys))
        return layout.visible(query, key, window)

    windowed = _exceeds(tree, window)
    whole, prefix = slice(0, tree.tokens), slice(0, tree.prefix)
    if len(tree.branches) == 1:
        return [Call(tree.tokens, whole, mask(whole, whole) if windowed else None)]
    found = [Call(tree.prefix, prefix, mask(prefix, prefix) if windowed else None)] if tree.prefix else []
    for group in _groups(tree.prefix, tree.branches):
        own = mask(group, group)
        to_prefix = mask(group, prefix) if windowed else own.new_ones(own.shape[0], tree.prefix)
        keys: slice | Tensor = slice(0, group.stop)  # of the first group, which follows the prefix
        if group.start > tree.prefix:
            keys = torch.cat([torch.arange(s.start, s.stop, device=device) for s in (prefix, group)])
        found.append(Call(group.stop - group.start, keys, torch.cat([to_prefix, own], dim=1)))
    return found


def _exceeds(tree: Tree, window: int | None) -> bool:
    """Whether an example of the tree is longer than the sliding window."""
    return window is not None and tree.prefix + max(tree.branches) > window + 1


def _groups(prefix: int, branches: tuple[int, ...]) -> list[slice]:
    """Ranges of whole branches of at most max(prefix, MAX_BRANCH_TOKENS_PER_CALL) tokens (at least one branch each)."""
    limit = max(prefix, MAX_BRANCH_TOKENS_PER_CALL)
    groups, first, end = [], prefix, prefix
    for length in branches:
        if end > first and end + length - first > limit:
            groups.append(slice(first, end))
            first = end
        end += length
    return [*groups, slice(first, end)]


def row_calls(layout: Layout, rows: Tensor, window: int | None = None) -> list[list[Call]]:
    """The call for each tree's share of the token indices `rows`, which are in the order of the trees."""
    borders = torch.searchsorted(rows, torch.tensor([*layout.starts, layout.tokens], device=rows.device)).tolist()
    found = []
    for start, tree, a, b in zip(layout.starts, layout.trees, borders[:-1], borders[1:], strict=True):
        key = torch.arange(start, start + tree.tokens, device=rows.device)
        found.append([Call(b - a, slice(0, tree.tokens), layout.visible(rows[a:b], key, window))] if b > a else [])
    return found


class PackedAttention:
    """Attention over one pack. Masks and indices, which depend on the layout alone, are built once for all layers."""

    def __init__(self, layout: Layout, backend: str = "sdpa", window: int | None = None, dropout: float = 0.0) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"attention {backend!r} is unknown: choose {', '.join(BACKENDS)}")
        self.layout, self.backend, self.window, self.dropout = layout, backend, window, dropout
        self._row_calls: tuple[Tensor, list[list[Call]]] | None = None

    def __call__(self, layer: int, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, rows: Tensor | None = None) -> Tensor:
        if not self.layout.trees:
            return q_TND  # without tokens, but part of the graph, as engines with several ranks require
        groups = q_TND.shape[1] // k_TMD.shape[1]
        if groups > 1:
            k_TMD, v_TMD = k_TMD.repeat_interleave(groups, 1), v_TMD.repeat_interleave(groups, 1)
        if self.backend == "eager":
            return self._eager(q_TND, k_TMD, v_TMD, rows)
        if self.backend == "flex_attention" and rows is None:
            return self._flex(q_TND, k_TMD, v_TMD)
        if self.backend == "flash_attention_2" and self._suits_flash(q_TND, rows):
            return flash.attend(q_TND, k_TMD, v_TMD, self._flash_calls)
        return self._sdpa(q_TND, k_TMD, v_TMD, rows)

    # -- sdpa ----------------------------------------------------------------------------------------------------

    @cached_property
    def _calls(self) -> list[list[Call]]:
        return calls(self.layout, self.window)

    def _calls_of(self, rows: Tensor) -> list[list[Call]]:
        if self._row_calls is None or self._row_calls[0] is not rows:
            self._row_calls = (rows, row_calls(self.layout, rows, self.window))
        return self._row_calls[1]

    def _sdpa(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, rows: Tensor | None) -> Tensor:
        # Split instead of sliced: the gradient of each slice would be a whole pack of zeros to add.
        found = self._calls if rows is None else self._calls_of(rows)
        sizes = [tree.tokens for tree in self.layout.trees]
        queries = iter(q_TND.split([call.queries for tree in found for call in tree]))
        out = [
            F.scaled_dot_product_attention(
                _heads_first(next(queries)),
                _heads_first(k_tree[call.keys]),
                _heads_first(v_tree[call.keys]),
                attn_mask=call.mask,
                is_causal=call.mask is None,
                dropout_p=self.dropout,
            )[0].transpose(0, 1)
            for tree, k_tree, v_tree in zip(found, k_TND.split(sizes), v_TND.split(sizes), strict=True)
            for call in tree
        ]
        return torch.cat(out) if out else torch.zeros_like(q_TND)

    # -- eager: the reference --------------------------------------------------------------------------------------

    def _eager(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, rows: Tensor | None) -> Tensor:
        everything = torch.arange(self.layout.tokens, device=q_TND.device)
        mask = self.layout.visible(everything if rows is None else rows, everything, self.window)
        return eager_attention(
            q_TND.transpose(0, 1), k_TND.transpose(0, 1), v_TND.transpose(0, 1), mask, self.dropout
        ).transpose(0, 1)

    # -- flex_attention --------------------------------------------------------------------------------------------

    def _flex(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        if self.dropout:
            raise ValueError("attention flex_attention has no dropout: set attention_dropout to 0 or choose sdpa")
        run: Any = compiled(flex_attention, q_TND.device)
        heads_first = (_heads_first(x) for x in (q_TND, k_TND, v_TND))
        return run(*heads_first, block_mask=self.block_mask)[0].transpose(0, 1)

    @cached_property
    def block_mask(self) -> Any:
        """The BlockMask of the pack. It closes over tensors only, so other packs need no recompilation."""
        from torch.nn.attention.flex_attention import create_block_mask

        tree, branch, position, window = self.layout.tree, self.layout.branch, self.layout.position, self.window

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (tree[query] == tree[key]) & ((branch[key] == -1) | (branch[key] == branch[query]))
            distance = position[query] - position[key]
            return seen & (distance >= 0) & (True if window is None else distance <= window)

        make: Any = compiled(create_block_mask, tree.device)  # compiled, it never materializes [T, T]
        return make(visible, None, None, self.layout.tokens, self.layout.tokens, device=str(tree.device))

    # -- flash_attention_2 -----------------------------------------------------------------------------------------

    def _suits_flash(self, q_TND: Tensor, rows: Tensor | None) -> bool:
        head_dim = q_TND.shape[-1]
        fits = head_dim % flash.HEAD_DIM_STEP == 0 and head_dim <= flash.MAX_HEAD_DIM
        return rows is None and fits and not self.dropout and not self._windowed

    @cached_property
    def _windowed(self) -> bool:
        return any(_exceeds(tree, self.window) for tree in self.layout.trees)

    @cached_property
    def _flash_calls(self) -> flash.Calls:
        return flash.calls(self.layout)


class CachedAttention:
    """Attention of a batch with left or right padding over a transformers cache, for `generate` and chats.

    The mask is [B, 1, L, K] bool: real keys up to the query, within the sliding window. A query of padding attends to
    itself, so that its (unused) row is finite.
    """

    def __init__(self, cache: Cache, attention_mask: Tensor, length: int, backend: str, window: int | None) -> None:
        past = cache.get_seq_length()
        device = attention_mask.device
        query = torch.arange(past, past + length, device=device)
        key = torch.arange(attention_mask.shape[1], device=device)
        distance = query[:, None] - key[None, :]
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance <= window)
        self.mask = (seen & attention_mask[:, None, :].bool() | (distance == 0))[:, None]
        self.cache, self.backend = cache, backend

    def __call__(
        self, layer: int, q_BLND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        assert rows is None, "row pruning is for packs"
        k, v = self.cache.update(k_BLMD.transpose(1, 2), v_BLMD.transpose(1, 2), layer)
        groups = q_BLND.shape[2] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mask = F.pad(self.mask, (0, k.shape[2] - self.mask.shape[3]))  # a static cache is longer than its content
        if self.backend == "eager":
            return eager_attention(q_BLND.transpose(1, 2), k, v, mask).transpose(1, 2)
        return F.scaled_dot_product_attention(q_BLND.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the last two dimensions with a bool mask; the softmax is in float32 at least."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function, compiled on CUDA, once for all layers and packs."""
    return compile_once(function) if device.type == "cuda" else function


@functools.cache
def compile_once(function: Callable[..., Any], backend: Any = "inductor") -> Callable[..., Any]:
    """The function, compiled for packs of any length."""
    return torch.compile(function, backend=backend, dynamic=True)


def _heads_first(x_TND: Tensor) -> Tensor:
    return x_TND.transpose(0, 1)[None]
