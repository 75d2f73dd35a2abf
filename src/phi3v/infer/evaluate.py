"""Answers to the questions of a data set, and their scores.

Every page is encoded once for all its questions; the answers are those of greedy decoding one question at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.markup import escape

from phi3v.base.config import Attention, Precision, check_flags
from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.files import make_folder
from phi3v.base.hardware import pick_device, pick_dtype, pick_tokens_per_pack
from phi3v.base.jsonfile import Count, NonNegativeInt
from phi3v.base.ranks import ALONE, Ranks
from phi3v.base.runfolder import RunFolder
from phi3v.base.stopping import Stopped
from phi3v.data.encode import Example, encode, questions
from phi3v.data.image import read_size
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.infer.labels import closed_answers, score_labels
from phi3v.infer.metrics import Prediction, accuracy, anls, label_tables
from phi3v.infer.metrics import score as scores_of
from phi3v.model.backend import pick_attention
from phi3v.model.generation import generate_pack
from phi3v.model.loading import load_model
from phi3v.model.parts import widen
from phi3v.model.quantization import read_quantization
from phi3v.packing.loader import Reading, prompt_packs
from phi3v.packing.trees import PackLimits


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
    ranks: Ranks = ALONE,
    leave_off: Callable[[], bool] = lambda: False,
) -> list[Prediction]:
    """Greedy answers, scored one by one, in the order of `prompts`; every rank takes its share and hears of all.

    `leave_off` is asked before every pack. Raises Stopped, on all ranks, when it says so on any.
    """
    device = next(model.parameters()).device
    sizes = functools.cache(read_size)  # a page has many questions
    encoded = [encode(prompt, processor, sizes) for prompt in prompts]
    answered: list[tuple[int, Prediction]] = []
    packs = prompt_packs(
        encoded, limits, reading, max_new_tokens=max_new_tokens, rank=ranks.rank, num_ranks=ranks.num, log=say
    )
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    with progress_bar(title, len(prompts), "questions", show=progress, summary=False) as advance, mixed:
        for batch in ranks.own(packs):
            if ranks.any(leave_off()):
                raise Stopped
            pack = batch.pack.to(device, non_blocking=True)
            found = generate_pack(model, pack, max_new_tokens=max_new_tokens, stop_token_ids=processor.stop_token_ids)
            for number, ids in zip(batch.numbers, found, strict=True):
                text = processor.decode(ids, skip_special_tokens=True)
                answered.append((number, _prediction(prompts[number], text, len(ids))))
            advance(len(found) * ranks.num)  # the others are about as far
    everyone = dict(pair for pairs in ranks.gather(answered) for pair in pairs)
    return [everyone[number] for number in range(len(prompts))]


class Scoring(NamedTuple):
    """How answers are found: written, or chosen among labels, or both."""

    by: Literal["generate", "labels", "both"] = "generate"
    labels: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, by: Literal["generate", "labels", "both"], labels: tuple[str, ...], examples: Iterable[Example]
    ) -> Scoring:
        """With the labels that `examples` have as answers, unless some are given. Raises InputError for free text."""
        if by == "generate":
            return cls()
        if not labels and (found := closed_answers(examples)) is None:
            raise InputError(f"--score {by} needs --labels: the answers are free text")
        return cls(by, labels or found or ())


def predict(
    model: Any,
    processor: Phi3VProcessor,
    prompts: Sequence[Example],
    scoring: Scoring,
    *,
    max_new_tokens: int,
    title: str = "evaluating",
    **how: Any,
) -> list[Prediction]:
    """Answers in the order of `prompts`, written or chosen or both; `how` is as for `answer`."""
    if scoring.by == "generate":
        return answer(model, processor, prompts, max_new_tokens=max_new_tokens, title=title, **how)
    scores = score_labels(model, processor, prompts, scoring.labels, title=title, **how).tolist()
    if scoring.by == "both":
        predictions = answer(model, processor, prompts, max_new_tokens=max_new_tokens, title=title, **how)
    else:
        likeliest = [scoring.labels[max(range(len(row)), key=row.__getitem__)] for row in scores]
        predictions = [_prediction(prompt, text, 0) for prompt, text in zip(prompts, likeliest, strict=True)]
    for prediction, row in zip(predictions, scores, strict=True):
        prediction["label_log_probs"] = dict(zip(scoring.labels, row, strict=True))
    return predictions


def _prediction(prompt: Example, text: str, num_tokens: int) -> Prediction:
    text = text.strip()
    found = Prediction(
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
    if prompt.group:
        found["group"] = prompt.group
    return found


class Answering(NamedTuple):
    """A model that is ready to answer, and how it does."""

    model: Any
    processor: Phi3VProcessor
    limits: PackLimits
    reading: Reading
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        folder: str | Path,
        *,
        num_crops: int | None,
        dtype: Precision,
        attention: Attention,
        num_workers: int,
        max_tokens_per_pack: int | None,
        max_crops_per_pack: int,
    ) -> Answering:
        """Loads the model in `folder` (see `model_folder`) for this machine; the rest is as the flags have it."""
        device = pick_device()
        precision = pick_dtype(dtype, device)
        if (how := read_quantization(Path(folder))) is not None:
            say(f"  base            in {how}, as it was trained on")
        backend = pick_attention(attention, device, precision)
        model, processor = load_model(folder, attention=backend, num_crops=num_crops, device=device)
        widen(model, precision)
        return cls(
            model=model.to(device).eval(),
            processor=processor,
            limits=PackLimits(
                max_tokens_per_pack=pick_tokens_per_pack(max_tokens_per_pack, device),
                max_crops_per_pack=max_crops_per_pack,
                original_max=model.config.original_max_position_embeddings,
            ),
            reading=Reading(
                image_token_id=processor.image_token_id, num_crops=processor.num_crops, num_workers=num_workers
            ),
            dtype=precision,
        )

    @property
    def how(self) -> dict[str, Any]:
        """For `predict`."""
        return {"limits": self.limits, "reading": self.reading, "dtype": self.dtype}


def evaluate(
    model: str,
    /,
    *,
    data: Path,
    image_root: Path | None = None,
    out: Path | None = None,
    limit: Count | None = None,
    num_crops: Count | None = None,
    max_new_tokens: Count = 64,
    score: Literal["generate", "labels", "both"] = "generate",
    labels: tuple[str, ...] = (),
    max_tokens_per_pack: Count | None = None,
    max_crops_per_pack: Count = 64,
    dtype: Precision = "auto",
    attention: Attention = "auto",
    num_workers: NonNegativeInt = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Answer every question of DATA and score the answers.

    Writes predictions.jsonl and metrics.json, and prints the scores.

    Args:
        model: A run folder (its final model), or a model or adapter folder, or a name on the Hub.
        data: Conversations, one JSON object a line.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        out: Where the results go. Default: `evaluation/<name of the data>` inside the run or model folder.
        limit: Answer only this many questions, evenly spread.
        num_crops: Tiles an image may be cut into. Default: the checkpoint's own.
        max_new_tokens: Longest answer, in tokens.
        score: generate: what the model writes. labels: the most likely of a closed set. both: one beside the other.
        labels: The closed set. Default: the answers of the data, if they are few.
        max_tokens_per_pack: Tokens of one forward pass. Default: 8192 on a GPU, 4096 on a CPU.
        max_crops_per_pack: 336x336 crops of one forward pass.
        dtype: Precision of the arithmetic.
        attention: How attention is computed. All choices compute the same.
        num_workers: Processes that read images.
        progress: Show a progress bar.
    """
    check_flags(locals(), evaluate)
    folder = model_folder(model)
    target = out or (Path(model) if Path(model).is_dir() else Path("runs")) / "evaluation" / Path(data).stem
    results = RunFolder(target)
    if results.is_run:
        raise InputError(f"--out {target} holds a run or a model: choose another folder")
    prompts = read_questions(data, image_root, limit)
    scoring = Scoring.of(score, labels, read_jsonl(data, image_root))
    make_folder(target)
    answering = Answering.of(
        folder,
        num_crops=num_crops,
        dtype=dtype,
        attention=attention,
        num_workers=num_workers,
        max_tokens_per_pack=max_tokens_per_pack,
        max_crops_per_pack=max_crops_per_pack,
    )
    if scoring.labels:
        say(f"  labels          {', '.join(scoring.labels)}")
    predictions = predict(
        answering.model,
        answering.processor,
        prompts,
        scoring,
        max_new_tokens=max_new_tokens,
        progress=progress,
        **answering.how,
    )
    results.save_predictions(predictions)
    metrics = scores_of(predictions)
    tables = {"labels": label_tables(predictions, scoring.labels)} if scoring.labels else {}
    results.save(metrics={**metrics, **tables})
    for name, value in metrics.items():
        say(f"  {name:<15} {value:,}" if name == "questions" else f"  {name:<15} {value:7.2%}")
    say(f"  predictions     {escape(str(results.predictions_file))}")
    return metrics


def model_folder(name: str | Path) -> str | Path:
    """The final model of a run folder; any other name is a model already. Raises InputError for an unfinished run."""
    folder = RunFolder(name)
    if folder.final.is_dir():
        return folder.final
    if folder.checkpoints.is_dir():
        raise InputError(f"{name} is an unfinished run: finish it with `phi3v train ... --out {name} --resume auto`")
    return name
