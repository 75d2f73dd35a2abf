"""Greedy answers for whole packs: a page is encoded once for all its questions, and the questions decode together.

Invariant: the answers are those of `model.generate` for one question at a time. Decoding is one batch of all branches
of the pack on a static cache, which holds the keys and values of a prefix once per tree, and those of each branch in a
row of its own.

Shapes: S trees, B branches, U questions of the largest tree, N heads, M key/value heads, D head_dim, P and L longest
prefix and branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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
    """Greedy continuations of all branches of a pack of prompts, in order, without the stop ids that end them.

    `model` is a `Phi3VForCausalLM`, bare or inside PEFT. An answer that outgrows the short RoPE regime is recomputed
    once with the long factors, as in `generate`.
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


class _Branch(NamedTuple):
    """One question of a pack."""

    tree: int
    slot: int
    """Its number within the tree."""
    prefix: range
    """Token indices of the tree's prefix."""
    own: range
    """Token indices of the branch."""


def _branches_of(layout: Layout) -> list[_Branch]:
    found = []
    for number, (start, tree) in enumerate(zip(layout.starts, layout.trees, strict=True)):
        at = start + tree.prefix
        for slot, length in enumerate(tree.branches):
            found.append(_Branch(number, slot, range(start, start + tree.prefix), range(at, at + length)))
            at += length
    return found


def _greedy(
    model: Phi3VForCausalLM, x_TH: Tensor, layout: Layout, max_new_tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    device, decoder, branches = x_TH.device, model.model, _branches_of(layout)
    border = model.config.original_max_position_embeddings
    long = torch.tensor([layout.trees[branch.tree].long for branch in branches], device=device)
    lengths = torch.tensor([len(branch.prefix) + len(branch.own) for branch in branches], device=device)

    recorded = _Recording(decoder.attention_of(layout))
    rope = decoder.rope(layout.position, layout.long)
    last_rows = torch.tensor([branch.own.stop - 1 for branch in branches], device=device)
    hidden = decoder.decode(x_TH, rope, recorded, last_rows)
    cache = _PageCache(layout, recorded, max_new_tokens, model.config.sliding_window)

    answers: list[list[int]] = [[] for _ in branches]
    unfinished = set(range(len(branches)))
    for step in range(max_new_tokens):
        chosen = model.lm_head(hidden).float().argmax(-1)
        for number, token in enumerate(chosen.tolist()):
            if token in stops:
                unfinished.discard(number)
            elif number in unfinished:
                answers[number].append(token)
        lengths = lengths + 1
        left = max_new_tokens - step - 1
        outgrown = [n for n in ((lengths > border) & ~long).nonzero()[:, 0].tolist() if n in unfinished]
        if outgrown and left:
            rests = _restart(model, x_TH, layout, answers, outgrown, left, stops)
            for number, rest in zip(outgrown, rests, strict=True):
                answers[number] += rest
            unfinished.difference_update(outgrown)
        if not unfinished or not left:
            break
        rope = decoder.rope(lengths - 1, long)
        hidden = decoder.decode(decoder.embed_tokens(chosen), rope, cache)
        cache.advance()
    return answers


def _restart(
    model: Phi3VForCausalLM,
    x_TH: Tensor,
    layout: Layout,
    answers: list[list[int]],
    numbers: list[int],
    max_new_tokens: int,
    stops: frozenset[int],
) -> list[list[int]]:
    """Continue the branches with these numbers, each as a tree of its own in the long regime, on the same images."""
    branches, pieces, trees = _branches_of(layout), list[Tensor](), []
    for number in numbers:
        prefix, own = branches[number].prefix, branches[number].own
        answer = model.model.embed_tokens(torch.tensor(answers[number], device=x_TH.device))
        pieces += [x_TH[prefix.start : prefix.stop], x_TH[own.start : own.stop], answer.to(x_TH.dtype)]
        trees.append(Tree(len(prefix), (len(own) + len(answer),), True))
    return _greedy(model, torch.cat(pieces), Layout.of(trees).to(x_TH.device), max_new_tokens, stops)


class _Recording:
    """Passes attention through and records the keys and values of every layer, [T, M, D] each."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.kv: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        self.kv.append((k, v))
        return self.attend(layer, q, k, v, rows)


class _PageCache:
    """Attention of one new token per branch over its tree's prefix and its own branch."""

    def __init__(self, layout: Layout, recorded: _Recording, max_new_tokens: int, window: int | None) -> None:
        device, branches = recorded.kv[0][0].device, _branches_of(layout)
        self.tree = torch.tensor([branch.tree for branch in branches], device=device)  # [B]
        self.slot = torch.tensor([branch.slot for branch in branches], device=device)  # [B]
        self.prefix = torch.tensor([tree.prefix for tree in layout.trees], device=device)  # [S]
        self.own = torch.tensor([len(branch.own) for branch in branches], device=device)  # [B] tokens so far
        self.window = window

        def padded(x_TMD: Tensor, spans: list[range], room: int) -> Tensor:  # -> [S or B, M, longest + room, D]
            x = pad_sequence([x_TMD[span.start : span.stop] for span in spans], batch_first=True)
            return F.pad(x.transpose(1, 2), (0, 0, 0, room))

        prefixes = [branch.prefix for branch in branches if branch.slot == 0]
        owns = [branch.own for branch in branches]
        self.prefix_kv = [tuple(padded(x, prefixes, 0) for x in kv) for kv in recorded.kv]
        self.branch_kv = [tuple(padded(x, owns, max_new_tokens) for x in kv) for kv in recorded.kv]
        self._set_visible()

    def _set_visible(self) -> None:
        """Set `visible` [B, 1, P + L]: the keys of its prefix and of its branch that each next token attends to."""
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
        self._set_visible()

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
        """[B, N, X] -> [S, N, U, X]: the questions of a page side by side, so that its keys are read once for all."""
        grouped = x_BNX.new_zeros(self.prefix.shape[0], int(self.slot.max()) + 1, *x_BNX.shape[1:])
        grouped[self.tree, self.slot] = x_BNX
        return grouped.transpose(1, 2)
