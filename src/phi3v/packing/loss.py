"""The loss: a weighted sum of cross entropies over target rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_PER_CHUNK = 2048
"""Logits that are held at once: 263 MB in float32 at the published vocabulary of 32064."""


def weighted_cross_entropy(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> Tensor:
    """sum_r w_r * CE(logits_r, target_r), a float32 scalar.

    The weights come with the pack and add up to one over all packs and ranks of an optimizer step. The objective
    therefore does not depend on how examples were packed.
    """
    return (F.cross_entropy(logits_RV.float(), targets_R, reduction="none") * weights_R).sum()


def loss_of_rows(
    head: Callable[[Tensor], Tensor], hidden_RH: Tensor, targets_R: Tensor, weights_R: Tensor, rows_per_chunk: int
) -> Tensor:
    """`weighted_cross_entropy` of `head(hidden)`, of which no more than `rows_per_chunk` rows exist at a time.

    Up to so many rows there is one chunk and nothing is computed twice. With more, each chunk's logits are dropped and
    computed again in the backward pass: for long answers they would outweigh everything else (R * V * 12 bytes).
    """

    def of(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weighted_cross_entropy(head(hidden), targets, weights)

    if hidden_RH.shape[0] <= rows_per_chunk:
        return of(hidden_RH, targets_R, weights_R)
    chunks = zip(*(torch.split(t, rows_per_chunk) for t in (hidden_RH, targets_R, weights_R)), strict=True)
    losses = [checkpoint(of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum()
