"""Greedy answers for whole packs: a page is encoded once for all its questions, and the questions decode together.

The same answers come out as from `model.generate` one question at a time. Decoding is one batch over all branches of
the pack on a static cache: keys of a prefix are held once per tree, keys of each branch in a row of their own.

Shapes: S trees, B branches, U questions of the largest tree, N heads, M key/value heads, D head_dim, P and L longest
prefix and branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phi3v.model.attention import Attend
from phi3v.model.phi3v import Phi3VForCausalLM
from phi3v.packing.layout import Layout, Tree

if TYPE_CHECKING:
    from phi3v.packing.pack import Pack


@torch.no_grad()
def generate_pack(
    model: Any, pack: Pack, *, max_new_tokens: int, stop_token_ids: tuple[int, ...] | list[int]
) -> list[list[int]]:
    """Greedy continuation of every branch of a pack of prompts, in order; stop ids end an answer and are not in it.

    `model` is a `Phi3VForCausalLM`, bare or inside PEFT. An answer that outgrows the short RoPE regime is encoded anew,
    once, with the long factors, as `generate` does.
    """
    if not pack.layout.trees:
        return []
    bare: Phi3VForCausalLM = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = bare.training
    bare.eval()
    try:
        return _greedy(bare, bare.model.embed_pack(pack), pack.layout, max_new_tokens, frozenset(stop_token_ids))
    finally:
        bare.train(was_training)


def _greedy(
    model: Phi3VForCausalLM, x_TH: Tensor, layout: Layout, max_new_tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    device, decoder = x_TH.device, model.model
    border = model.config.original_max_position_embeddings
    spans = [span for spans in _branch_spans(layout) for span in spans]
    long = torch.tensor([tree.long for tree in layout.trees for _ in tree.branches], device=device)
    lengths = torch.tensor([tree.prefix + n for tree in layout.trees for n in tree.branches], device=device)

    recorded = _Recording(decoder.attention_of(layout))
    rope = decoder.rope(layout.position, layout.long, torch.float32)
    last_rows = torch.tensor([stop - 1 for _, stop in spans], device=device)
    hidden = decoder.decode(x_TH, rope, recorded, last_rows)
    cache = _PageCache(layout, recorded, max_new_tokens, model.config.sliding_window)

    answers: list[list[int]] = [[] for _ in spans]
    open_branches = set(range(len(spans)))
    for step in range(max_new_tokens):
        chosen = model.lm_head(hidden).float().argmax(-1)
        for branch, token in enumerate(chosen.tolist()):
            if branch not in open_branches:
                continue
            if token in stops:
                open_branches.discard(branch)
            else:
                answers[branch].append(token)
        if not open_branches or step == max_new_tokens - 1:
            break
        lengths = lengths + 1
        outgrown = [b for b in ((lengths > border) & ~long).nonzero()[:, 0].tolist() if b in open_branches]
        if outgrown:
            left = max_new_tokens - step - 1
            for branch, rest in zip(outgrown, _anew(model, x_TH, layout, answers, outgrown, left, stops), strict=True):
                answers[branch] += rest
            open_branches.difference_update(outgrown)
            if not open_branches:
                break
        rope = decoder.rope(lengths - 1, long, torch.float32)
        hidden = decoder.decode(decoder.embed_tokens(chosen), rope, cache)
        cache.advance()
    return answers


def _anew(
    model: Phi3VForCausalLM,
    x_TH: Tensor,
    layout: Layout,
    answers: list[list[int]],
    branches: list[int],
    max_new_tokens: int,
    stops: frozenset[int],
) -> list[list[int]]:
    """Continue some branches, each as a tree of its own in the long regime, images not encoded again."""
    pieces, trees = [], []
    spans = [
        (start, tree.prefix, span)
        for start, tree, spans in zip(layout.starts, layout.trees, _branch_spans(layout), strict=True)
        for span in spans
    ]
    for branch in branches:
        start, prefix, (a, b) = spans[branch]
        written = model.model.embed_tokens(torch.tensor(answers[branch], device=x_TH.device))
        pieces += [x_TH[start : start + prefix], x_TH[a:b], written.to(x_TH.dtype)]
        trees.append(Tree(prefix, (b - a + len(answers[branch]),), True))
    return _greedy(model, torch.cat(pieces), Layout.of(trees).to(x_TH.device), max_new_tokens, stops)


def _branch_spans(layout: Layout) -> list[list[tuple[int, int]]]:
    """Per tree, the token range of each branch."""
    found = []
    for start, tree in zip(layout.starts, layout.trees, strict=True):
        at, spans = start + tree.prefix, []
        for length in tree.branches:
            spans.append((at, at + length))
            at += length
        found.append(spans)
    return found


class _Recording:
    """Passes attention through and keeps the keys and values of every layer, [T, M, D] each."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        return self.attend(layer, q, k, v, rows)


class _PageCache:
    """Attention of one new token per branch over its tree's prefix and its own branch."""

    def __init__(self, layout: Layout, recorded: _Recording, max_new_tokens: int, window: int | None) -> None:
        device = recorded.keys[0].device
        spans = _branch_spans(layout)
        counts = [len(found) for found in spans]
        self.tree = torch.arange(len(counts), device=device).repeat_interleave(
            torch.tensor(counts, device=device)
        )  # [B]
        self.slot = torch.cat([torch.arange(count, device=device) for count in counts])  # [B] number within the tree
        self.prefix = torch.tensor([tree.prefix for tree in layout.trees], device=device)  # [S]
        self.own = torch.tensor([b - a for found in spans for a, b in found], device=device)  # [B] tokens so far
        self.window = window

        starts = list(zip(layout.starts, layout.trees, strict=True))
        prefixes = [slice(start, start + tree.prefix) for start, tree in starts]
        branches = [slice(a, b) for found in spans for a, b in found]

        def padded(x_TMD: Tensor, at: list[slice], room: int) -> Tensor:  # -> [S or B, M, longest + room, D]
            return F.pad(pad_sequence([x_TMD[span] for span in at], batch_first=True).transpose(1, 2), (0, 0, 0, room))

        self.prefix_kv = [
            tuple(padded(x, prefixes, 0) for x in kv) for kv in zip(recorded.keys, recorded.values, strict=True)
        ]
        self.branch_kv = [
            tuple(padded(x, branches, max_new_tokens) for x in kv)
            for kv in zip(recorded.keys, recorded.values, strict=True)
        ]
        self._see()

    def _see(self) -> None:
        """Which keys each branch's next token sees: [B, 1, P] of its prefix and [B, 1, L] of its own."""
        device = self.own.device
        prefix = self.prefix[self.tree][:, None]
        key_P = torch.arange(self.prefix_kv[0][0].shape[2], device=device)
        key_L = torch.arange(self.branch_kv[0][0].shape[2], device=device)
        query = self.own[:, None]  # the new token's index in its own branch
        see_prefix, see_own = key_P < prefix, key_L <= query
        if self.window is not None:
            see_prefix = see_prefix & (prefix + query - key_P <= self.window)
            see_own = see_own & (query - key_L <= self.window)
        self.visible = torch.cat([see_prefix, see_own], dim=1)[:, None]

    def advance(self) -> None:
        self.own = self.own + 1
        self._see()

    def __call__(self, layer: int, q_BND: Tensor, k_BMD: Tensor, v_BMD: Tensor, rows: Tensor | None = None) -> Tensor:
        branches = torch.arange(q_BND.shape[0], device=q_BND.device)
        for kept, new in zip(self.branch_kv[layer], (k_BMD, v_BMD), strict=True):
            kept[branches, :, self.own] = new
        groups = q_BND.shape[1] // k_BMD.shape[1]
        prefix_k, prefix_v, own_k, own_v = (
            x.repeat_interleave(groups, 1) if groups > 1 else x
            for x in (*self.prefix_kv[layer], *self.branch_kv[layer])
        )
        q_SNUD = self._by_tree(q_BND)
        to_prefix = (q_SNUD @ prefix_k.transpose(-1, -2)).transpose(1, 2)[self.tree, self.slot]  # [B, N, P]
        to_own = (own_k @ q_BND[..., None])[..., 0]  # [B, N, L]
        scores = torch.cat([to_prefix, to_own], dim=-1) * q_BND.shape[-1] ** -0.5
        weights = scores.float().masked_fill(~self.visible, float("-inf")).softmax(-1).to(q_BND.dtype)
        on_prefix, on_own = weights.split([prefix_k.shape[2], own_k.shape[2]], dim=-1)
        from_prefix = (self._by_tree(on_prefix) @ prefix_v).transpose(1, 2)[self.tree, self.slot]
        return from_prefix + (on_own[..., None, :] @ own_v)[..., 0, :]

    def _by_tree(self, x_BNX: Tensor) -> Tensor:
        """[B, N, X] -> [S, N, U, X]: the questions of a page side by side, so that its keys are read once."""
        grouped = x_BNX.new_zeros(self.prefix.shape[0], int(self.slot.max()) + 1, *x_BNX.shape[1:])
        grouped[self.tree, self.slot] = x_BNX
        return grouped.transpose(1, 2)
