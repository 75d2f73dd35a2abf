"""Answers to the questions of a data set, and their scores.

Every page is encoded once for all its questions; the answers are those of greedy decoding one question at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from phi3v.checkpoint import write_text
from phi3v.data.chat import Example, encode, questions
from phi3v.data.loader import Reading, prompt_packs
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.data.tree import PackLimits
from phi3v.metrics import Prediction, accuracy, anls, clean, score
from phi3v.model.generation import generate_pack
from phi3v.runlog import progress_bar


def read_questions(path: Path, image_root: Path | None, limit: int | None = None) -> list[Example]:
    """One prompt per answered turn of every conversation in a file; with `limit`, that many, evenly spread."""
    found = [question for example in read_jsonl(path, image_root) for question in questions(example)]
    return evenly(found, limit)


def evenly(items: list[Example], limit: int | None) -> list[Example]:
    """At most `limit` items at equal distances, the first among them."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def answer(
    model: Any,
    processor: Phi3VProcessor,
    prompts: Sequence[Example],
    *,
    limits: PackLimits,
    reading: Reading,
    max_new_tokens: int,
    dtype: torch.dtype,
    title: str = "evaluating",
    progress: bool = True,
) -> list[Prediction]:
    """Greedy answers, scored one by one, in the order of `prompts`."""
    device = next(model.parameters()).device
    encoded = [encode(prompt, processor) for prompt in prompts]
    predictions: list[Prediction | None] = [None] * len(prompts)
    packs = prompt_packs(encoded, limits, reading, max_new_tokens=max_new_tokens)
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    with progress_bar(title, len(prompts), "questions", show=progress) as advance, mixed:
        for batch in packs:
            pack = batch.pack.to(device, non_blocking=True)
            found = generate_pack(
                model, pack, max_new_tokens=max_new_tokens, stop_token_ids=processor.stop_token_ids
            )
            for number, ids in zip(batch.numbers, found, strict=True):
                text = processor.decode(ids, skip_special_tokens=True)
                predictions[number] = _prediction(prompts[number], text, len(ids))
            advance(len(found))
    assert all(predictions)
    return [prediction for prediction in predictions if prediction is not None]


def _prediction(prompt: Example, text: str, num_tokens: int) -> Prediction:
    text = clean(text)
    return Prediction(
        id=prompt.id,
        source=prompt.source,
        where=prompt.where,
        images=list(prompt.images),
        user=prompt.turns[-1].user,
        answers=list(prompt.answers),
        prediction=text,
        correct=bool(accuracy(text, prompt.answers)),
        anls=anls(text, prompt.answers),
        num_tokens=num_tokens,
    )


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> dict[str, float]:
    """`predictions.jsonl`, one question a line; returns the mean of every metric."""
    lines = (json.dumps(prediction, ensure_ascii=False) for prediction in predictions)
    write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    return score(predictions)
