"""The loss: a weighted sum of cross entropies over supervised rows."""

import torch.nn.functional as F
from torch import Tensor


def weighted_cross_entropy(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> Tensor:
    """sum_r w_r * CE(logits_r, target_r), a float32 scalar.

    The weights come with the pack and add up to one over all packs and ranks of an optimizer step. The objective
    (mean over an example's tokens, then over examples) therefore does not know how examples were packed.
    """
    return (F.cross_entropy(logits_RV.float(), targets_R, reduction="none") * weights_R).sum()
