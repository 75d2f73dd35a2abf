"""Attention of the decoder: one `attend(layer, q, k, v, rows)`, whatever lies behind it.

Shapes: T tokens of a pack, R query rows, B batch, L query length, K key length, N heads, M key/value heads, D head_dim.

`PackedAttention` reads the layout of a pack. Its backends compute the same function, and the dense mask ("eager") is
the oracle for all of them:

    sdpa               one call per prefix and one for all branches of a tree; keys are slices of the pack, and a prefix
                       is copied only for branches past the first MAX_BRANCH_TOKENS_PER_CALL tokens
    eager              the dense [T, T] mask, softmax in float32
    flex_attention     a block mask built once per pack
    flash_attention_2  two variable-length calls per pack: prefixes, then branches with their prefix gathered in front

`CachedAttention` serves `generate`: a padded batch over a transformers cache.
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

from phi3v.layout import Layout, Tree

BACKENDS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
# Branches of one tree share a masked call up to this many tokens (or the prefix, if longer): past that, the masked-out
# blocks between branches would cost more than copying the prefix once more.
MAX_BRANCH_TOKENS_PER_CALL = 1024


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, /) -> Tensor:
        """q [..., N, D] and k, v [..., M, D]. Queries of `rows` (all tokens if None) against all keys -> shape of q."""


class Call(NamedTuple):
    """One SDPA call inside a tree: how many queries, and which keys of the tree they see. No mask means causal."""

    queries: int
    keys: slice | Tensor
    mask: Tensor | None


def calls(layout: Layout, window: int | None = None) -> list[list[Call]]:
    """Per tree, the SDPA calls that together compute its attention, in the order of its tokens."""
    return [
        _calls_of_tree(layout, start, tree, window) for start, tree in zip(layout.starts, layout.trees, strict=True)
    ]


def _calls_of_tree(layout: Layout, start: int, tree: Tree, window: int | None) -> list[Call]:
    device = layout.position.device

    def mask(queries: slice, keys: slice) -> Tensor:
        query, key = (torch.arange(start + s.start, start + s.stop, device=device) for s in (queries, keys))
        return layout.visible(query, key, window)

    bites = window is not None and tree.prefix + max(tree.branches) > window + 1
    whole, prefix = slice(0, tree.tokens), slice(0, tree.prefix)
    if len(tree.branches) == 1:
        return [Call(tree.tokens, whole, mask(whole, whole) if bites else None)]
    found = [Call(tree.prefix, prefix, mask(prefix, prefix) if bites else None)] if tree.prefix else []
    for group in _groups(tree.prefix, tree.branches):
        own = mask(group, group)
        to_prefix = mask(group, prefix) if bites else own.new_ones(own.shape[0], tree.prefix)
        # The prefix lies right before the first branches: one slice. Further groups need it copied in front.
        first = group.start == tree.prefix
        keys = (
            slice(0, group.stop)
            if first
            else torch.cat([torch.arange(s.start, s.stop, device=device) for s in (prefix, group)])
        )
        found.append(Call(group.stop - group.start, keys, torch.cat([to_prefix, own], dim=1)))
    return found


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
    """Per tree, the one call for its share of the token indices `rows`, which are in the order of the trees."""
    borders = torch.searchsorted(rows, torch.tensor([*layout.starts, layout.tokens], device=rows.device)).tolist()
    found = []
    for start, tree, a, b in zip(layout.starts, layout.trees, borders[:-1], borders[1:], strict=True):
        key = torch.arange(start, start + tree.tokens, device=rows.device)
        found.append([Call(b - a, slice(0, tree.tokens), layout.visible(rows[a:b], key, window))] if b > a else [])
    return found


class PackedAttention:
    """Attention over one pack. Everything that depends on the layout alone is built once and used by every layer."""

    def __init__(self, layout: Layout, backend: str = "sdpa", window: int | None = None, dropout: float = 0.0) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"attention {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
        self.layout, self.backend, self.window, self.dropout = layout, backend, window, dropout
        self._row_calls: tuple[Tensor, list[list[Call]]] | None = None

    def __call__(self, layer: int, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, rows: Tensor | None = None) -> Tensor:
        if not self.layout.trees:
            return q_TND  # of no tokens; the gradient still goes through, as engines with several ranks need it
        groups = q_TND.shape[1] // k_TMD.shape[1]
        if groups > 1:
            k_TMD, v_TMD = k_TMD.repeat_interleave(groups, 1), v_TMD.repeat_interleave(groups, 1)
        if self.backend == "eager":
            return self._eager(q_TND, k_TMD, v_TMD, rows)
        if self.backend == "flex_attention":
            return self._flex(q_TND, k_TMD, v_TMD, rows)
        if self.backend == "flash_attention_2" and rows is None:
            return self._flash(q_TND, k_TMD, v_TMD)
        return self._sdpa(q_TND, k_TMD, v_TMD, rows)  # a few rows against long keys: also what flash has no use for

    # -- sdpa ----------------------------------------------------------------------------------------------------

    @cached_property
    def _calls(self) -> list[list[Call]]:
        return calls(self.layout, self.window)

    def _calls_of(self, rows: Tensor) -> list[list[Call]]:
        if self._row_calls is None or self._row_calls[0] is not rows:
            self._row_calls = (rows, row_calls(self.layout, rows, self.window))
        return self._row_calls[1]

    def _sdpa(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, rows: Tensor | None) -> Tensor:
        # Split once, never slice the whole pack: the gradient of each slice would be a pack of zeros to add up.
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

    # -- eager: the oracle -----------------------------------------------------------------------------------------

    def _eager(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, rows: Tensor | None) -> Tensor:
        everything = torch.arange(self.layout.tokens, device=q_TND.device)
        mask = self.layout.visible(everything if rows is None else rows, everything, self.window)
        return eager_attention(
            q_TND.transpose(0, 1), k_TND.transpose(0, 1), v_TND.transpose(0, 1), mask, self.dropout
        ).transpose(0, 1)

    # -- flex_attention --------------------------------------------------------------------------------------------

    def _flex(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, rows: Tensor | None) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        if self.dropout:
            raise ValueError("attention flex_attention has no dropout: set attention_dropout to 0 or choose sdpa")
        run: Any = _compiled(flex_attention) if q_TND.is_cuda else flex_attention
        mask = self._flex_mask if rows is None else self._block_mask(rows)
        return run(_heads_first(q_TND), _heads_first(k_TND), _heads_first(v_TND), block_mask=mask)[0].transpose(0, 1)

    @cached_property
    def _flex_mask(self):
        return self._block_mask(None)

    def _block_mask(self, rows: Tensor | None):
        from torch.nn.attention.flex_attention import create_block_mask

        tree, branch, position, window = self.layout.tree, self.layout.branch, self.layout.position, self.window

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query = query if rows is None else rows[query]
            seen = (tree[query] == tree[key]) & ((branch[key] == -1) | (branch[key] == branch[query]))
            distance = position[query] - position[key]
            return seen & (distance >= 0) & (True if window is None else distance <= window)

        queries = self.layout.tokens if rows is None else rows.shape[0]
        return create_block_mask(visible, None, None, queries, self.layout.tokens, device=str(tree.device))

    # -- flash_attention_2 -----------------------------------------------------------------------------------------

    @cached_property
    def _varlen(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]:
        """Per call: query tokens, key tokens, and the cumulative lengths of both. Causal, aligned bottom-right."""
        device = self.layout.position.device
        calls = []
        spans: dict[str, list[tuple[list[range], list[range]]]] = {"prefix": [], "branch": []}
        for start, tree in zip(self.layout.starts, self.layout.trees, strict=True):
            if len(tree.branches) == 1:
                spans["prefix"].append(([range(start, start + tree.tokens)],) * 2)
                continue
            prefix, at = range(start, start + tree.prefix), start + tree.prefix
            if tree.prefix:
                spans["prefix"].append(([prefix], [prefix]))
            for length in tree.branches:
                own = range(at, at + length)
                spans["branch"].append(([own], [prefix, own]))
                at += length
        for pairs in spans.values():
            if not pairs:
                continue
            sides = []
            for side in (0, 1):
                index = torch.tensor([i for pair in pairs for span in pair[side] for i in span], device=device)
                lengths = torch.tensor([0] + [sum(len(span) for span in pair[side]) for pair in pairs], device=device)
                sides.append((index, lengths.cumsum(0, dtype=torch.int32)))
            calls.append((sides[0][0], sides[1][0], sides[0][1], sides[1][1]))
        return tuple(calls)

    def _flash(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        window = (-1, -1) if self.window is None else (self.window, 0)
        out = torch.empty_like(q_TND)
        for query, keys, cu_q, cu_k in self._varlen:
            part = flash_attn_varlen_func(
                q_TND[query],
                k_TND[keys],
                v_TND[keys],
                cu_seqlens_q=cu_q,
                cu_seqlens_k=cu_k,
                max_seqlen_q=int(cu_q.diff().max()),
                max_seqlen_k=int(cu_k.diff().max()),
                dropout_p=self.dropout,
                causal=True,
                window_size=window,
            )
            out = out.index_copy(0, query, part)
        return out


class CachedAttention:
    """Attention of a (left- or right-padded) batch over a transformers cache, for `generate` and chat loops.

    The mask is [B, 1, L, K] bool: real keys at or before the query, inside the sliding window. A padding query sees
    itself, so that its (unused) row stays finite.
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
        mask = F.pad(self.mask, (0, k.shape[2] - self.mask.shape[3]))  # a static cache is longer than what it holds
        if self.backend == "eager":
            return eager_attention(q_BLND.transpose(1, 2), k, v, mask).transpose(1, 2)
        return F.scaled_dot_product_attention(q_BLND.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the last two dimensions with a bool mask; the softmax is in float32 at least."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


@functools.cache  # one compiled function for all layers and packs
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _heads_first(x_TND: Tensor) -> Tensor:
    return x_TND.transpose(0, 1)[None]
