"""Closed answer sets: how likely is each label as the answer to a question?

The score of a label is log p(label | page, question), the sum over its own tokens, as training has them, and the
`<|end|>` after them: the logarithm of the probability that the model writes exactly this and stops. Without `<|end|>`,
"a" would gain from every answer that only starts with it ("ab"). What training learns after it (a newline and
`<|endoftext|>`) does not depend on the answer and is left out, also of the length that decides the RoPE regime.

Every label is a branch. What the branches of a page share is computed once; `share` decides what that is.
`metrics.likeliest` chooses among the scores.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.ranks import ALONE, Ranks
from phi3v.base.stopping import Stopped
from phi3v.data.encode import Encoded, Example, encode, without_images
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.metrics import normalize_answer
from phi3v.packing.loader import Reading, prompt_packs
from phi3v.packing.trees import PackLimits, group

MAX_LABELS = 101  # the classes of UCF101, the largest closed set of the recipes


def closed_answers(examples: Iterable[Example]) -> tuple[str, ...] | None:
    """The answers of a task that has few of them, sorted; None if they are free text, or all the same.

    Few means at most MAX_LABELS, each given twice on average. Of spellings that `accuracy` treats as one answer the
    most frequent is kept.
    """
    counts = Counter(turn.assistant.strip() for e in examples for turn in e.turns if turn.loss and turn.assistant)
    spellings = {normalize_answer(text): text for text, _ in reversed(counts.most_common())}
    few = 2 <= len(spellings) <= min(MAX_LABELS, counts.total() // 2)
    return tuple(sorted(spellings.values())) if few else None


@torch.no_grad()
def score_labels(
    model: Any,
    processor: Phi3VProcessor,
    prompts: Sequence[Example],
    labels: Sequence[str],
    *,
    limits: PackLimits,
    reading: Reading,
    dtype: torch.dtype,
    title: str = "scoring labels",
    progress: bool = True,
    ranks: Ranks = ALONE,
    leave_off: Callable[[], bool] = lambda: False,
) -> Tensor:
    """log p(label | page, question) for P prompts and L labels: [P, L] float64, on the CPU.

    Every rank computes its share and returns all of them. `leave_off` is asked before every pack. Raises Stopped, on
    all ranks, when it returns true on any, and InputError for labels that `label_tokens` refuses and for what cannot be
    encoded or read.
    """
    assert all(prompt.turns[-1].assistant is None for prompt in prompts)
    sizes = functools.cache(processor.read_size)  # a page has many questions
    endings = label_tokens(labels, processor)
    branches = Branches(share([encode(prompt, processor, sizes) for prompt in prompts], len(labels)), endings)
    packs = prompt_packs(branches, limits, reading, max_new_tokens=0, rank=ranks.rank, num_ranks=ranks.num, log=say)
    device = next(model.parameters()).device
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scores = torch.zeros(len(branches), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with progress_bar(title, len(branches), "labels", show=progress, summary=False) as advance, mixed:
            for numbers, on_cpu in ranks.own(packs):
                if ranks.any(leave_off()):
                    raise Stopped
                pack = on_cpu.to(device, non_blocking=True)
                losses = F.cross_entropy(model(pack=pack).logits, pack.targets, reduction="none")
                at = torch.tensor(numbers, dtype=torch.int64)[on_cpu.branch]
                scores.index_add_(0, at, -losses.double().cpu())
                advance(len(numbers) * ranks.num)  # the other ranks are about as far
    finally:
        model.train(was_training)
    whole = torch.tensor(ranks.total(*scores.tolist()), dtype=torch.float64)  # the scores of other ranks are 0 here
    return whole.view(len(prompts), len(labels))


def label_tokens(labels: Sequence[str], processor: Phi3VProcessor) -> list[NDArray[np.int32]]:
    """The ids of each label as an answer in training, up to and including `<|end|>`.

    Raises InputError for fewer than two labels, an empty one, and two that `accuracy` treats as one answer.
    """
    if len(labels) < 2:
        raise InputError(f"--labels needs at least 2 labels, got {len(labels)}")
    seen: dict[str, str] = {}
    for label in labels:
        if not label.strip():
            raise InputError("--labels: a label is empty")
        if (key := normalize_answer(label)) in seen:
            raise InputError(f"--labels: {seen[key]!r} and {label!r} are the same answer to `accuracy`")
        seen[key] = label
    texts = [f"<|assistant|>\n{without_images(label, 'an answer')}<|end|>" for label in labels]
    return [np.array(processor.token_ids(text)[1:], dtype=np.int32) for text in texts]


def share(prompts: Sequence[Encoded], num_labels: int) -> list[Encoded]:
    """The prompts with the prefixes that their labels should share: page by page the cheaper of two ways.

    A tree has one prefix. So a page of P tokens with questions of q1, q2, ... tokens and L labels is either one tree,
    whose branches repeat the question for every label, or a tree for every question, each of which repeats the page:

        P + L (q1 + q2 + ...)   or   (P + q1) + (P + q2) + ...   tokens, and in both ways those of the labels
    """
    page = group(prompts)
    shared = np.array([prompt.prefix_tokens for prompt in prompts])
    own = np.array([prompt.tokens for prompt in prompts]) - shared
    once = shared + num_labels * np.bincount(page, own)[page]
    every = np.bincount(page, shared + own)[page]
    by_question = every <= once
    return [
        replace(prompt, prefix=len(prompt.ids)) if alone else prompt
        for prompt, alone in zip(prompts, by_question, strict=True)
    ]


class Branches(Sequence[Encoded]):
    """Every prompt with every label as its answer, made on access: number n is prompt n // L with label n % L."""

    def __init__(self, prompts: Sequence[Encoded], labels: Sequence[NDArray[np.int32]]) -> None:
        self.prompts, self.labels = prompts, labels

    def __len__(self) -> int:
        return len(self.prompts) * len(self.labels)

    def __getitem__(self, number: int) -> Encoded:  # type: ignore[override]  # no slices
        prompt, label = self.prompts[number // len(self.labels)], self.labels[number % len(self.labels)]
        ids = np.concatenate([prompt.ids, label])
        return replace(prompt, ids=ids, loss_mask=np.arange(len(ids)) >= len(prompt.ids))
