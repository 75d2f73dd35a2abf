"""A model that answers: questions in, predictions out, the same for every command and for training.

Every page is encoded once for all its questions. The answers are those of greedy decoding, one question at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from phi3v.base.config import Attention, Colors, Orientation, Precision
from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.hardware import pick_dtype, pick_tokens_per_pack
from phi3v.base.jsonfile import Count, NonNegativeInt
from phi3v.base.ranks import ALONE, Ranks
from phi3v.base.runfolder import RunFolder, model_digest
from phi3v.base.stopping import Stopped
from phi3v.data.encode import Example, Turn, encode, questions
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.infer.labels import closed_answers, score_labels
from phi3v.infer.metrics import Prediction, accuracy, anls
from phi3v.infer.stream import Sampling, stream
from phi3v.model.backend import pick_attention
from phi3v.model.generation import generate_pack
from phi3v.model.loading import load_model
from phi3v.model.parts import widen
from phi3v.packing.loader import Reading, prompt_packs
from phi3v.packing.trees import PackLimits

Item = TypeVar("Item")
Images = str | Path | Sequence[str | Path] | None
ScoredBy = Literal["generate", "labels", "both"]

# -- questions -------------------------------------------------------------------------------------------------------


def read_questions(path: Path, image_root: Path | None, limit: int | None = None) -> list[Example]:
    """One prompt per answered turn of every conversation in a file; with `limit`, that many, evenly spread."""
    found = [question for example in read_jsonl(path, image_root) for question in questions(example)]
    return evenly(found, limit)


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items at equal distances, the first among them."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


# -- answers ---------------------------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    """Where answers come from: the model writes them, or the most likely of a set of labels is chosen, or both."""

    by: ScoredBy = "generate"
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, by: ScoredBy, labels: tuple[str, ...], examples: Iterable[Example]) -> Scoring:
        """Without `labels`, the answers of `examples` are the labels. Raises InputError if these are free text."""
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
    """Answers in the order of `prompts`; `how` are the keywords that `answer` and `score_labels` share."""
    if scoring.by == "generate":
        return answer(model, processor, prompts, max_new_tokens=max_new_tokens, title=title, **how)
    scores = score_labels(model, processor, prompts, scoring.labels, title=title, **how)
    if scoring.by == "both":
        predictions = answer(model, processor, prompts, max_new_tokens=max_new_tokens, title=title, **how)
    else:
        likeliest = [scoring.labels[label] for label in scores.numpy().argmax(1)]  # the first of equals
        predictions = [_prediction(prompt, text, 0) for prompt, text in zip(prompts, likeliest, strict=True)]
    for prediction, row in zip(predictions, scores.tolist(), strict=True):
        prediction["label_log_probs"] = dict(zip(scoring.labels, row, strict=True))
    return predictions


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
    """Greedy answers in the order of `prompts`. Every rank computes its share and returns all of them.

    `leave_off` is asked before every pack. Raises Stopped, on all ranks, when it returns true on any, and InputError
    for what cannot be encoded or read.
    """
    device = next(model.parameters()).device
    sizes = functools.cache(processor.read_size)  # a page has many questions
    encoded = [encode(prompt, processor, sizes) for prompt in prompts]
    answered: list[tuple[int, Prediction]] = []
    packs = prompt_packs(
        encoded, limits, reading, max_new_tokens=max_new_tokens, rank=ranks.rank, num_ranks=ranks.num, log=say
    )
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with progress_bar(title, len(prompts), "questions", show=progress, summary=False) as advance, mixed:
        for batch in ranks.own(packs):
            if ranks.any(leave_off()):
                raise Stopped
            pack = batch.pack.to(device, non_blocking=True)
            found = generate_pack(model, pack, max_new_tokens=max_new_tokens, stop_token_ids=processor.stop_token_ids)
            for number, ids in zip(batch.numbers, found, strict=True):
                text = processor.decode(ids, skip_special_tokens=True)
                answered.append((number, _prediction(prompts[number], text, len(ids))))
            advance(len(found) * ranks.num)  # the other ranks are about as far
    everyone = dict(pair for pairs in ranks.gather(answered) for pair in pairs)
    return [everyone[number] for number in range(len(prompts))]


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


# -- a loaded model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the model is loaded and computes."""

    num_crops: Count | None = None
    """Tiles an image may be cut into, besides its global view. Default: the checkpoint's own."""

    exif_orientation: Orientation | None = None
    """Whether images are turned as their EXIF orientation says. Default: as in training."""

    image_colors: Colors | None = None
    """Whether values outside 0..255 are clipped and transparency is dropped (published), or such values scaled and
    transparent images laid on white (visible). Default: as in training."""

    dtype: Precision = "auto"
    """Precision of the arithmetic."""

    attention: Attention = "auto"
    """How attention is computed. All choices compute the same."""

    base: str | None = None
    """Where the base model of an adapter is now. Default: where it was in training."""

    @property
    def seeing(self) -> dict[str, Any]:
        """The keywords of `Phi3VProcessor.from_pretrained`."""
        return {name: getattr(self, name) for name in ("num_crops", "exif_orientation", "image_colors")}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How many questions are answered at once, which changes the speed and not the answers."""

    max_tokens_per_pack: Count | None = None
    """Tokens of one forward pass. Default: 8192 on a GPU, 4096 on a CPU."""

    max_crops_per_pack: Count = 64
    """336x336 crops of one forward pass, tiles and global views together."""

    num_workers: NonNegativeInt = 0
    """Processes that read images."""


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model that is ready to answer."""

    model: Any
    processor: Phi3VProcessor
    limits: PackLimits
    reading: Reading
    dtype: torch.dtype
    ranks: Ranks = ALONE

    @classmethod
    def load(
        cls, name: str | Path, loading: Loading = Loading(), packing: Packing = Packing(), ranks: Ranks = ALONE
    ) -> Answerer:
        """Load a run folder (its final model), a model or adapter folder, or a model of the Hub, ready to `ask`.

        It goes to the fastest device of this machine, on each of several ranks to its own. Raises InputError.
        """
        check_base(name, loading.base)
        device = ranks.device
        dtype = pick_dtype(loading.dtype, device)
        attention = pick_attention(loading.attention, device, dtype)
        model, processor = load_model(
            model_folder(name), attention=attention, device=device, base=loading.base, **loading.seeing
        )
        widen(model, dtype)
        return cls(
            model=model.to(device).eval(),
            processor=processor,
            limits=PackLimits(
                max_tokens_per_pack=pick_tokens_per_pack(packing.max_tokens_per_pack, device),
                max_crops_per_pack=packing.max_crops_per_pack,
                original_max=model.config.original_max_position_embeddings,
            ),
            reading=Reading(
                image_token_id=processor.image_token_id,
                num_crops=processor.num_crops,
                rules=processor.rules,
                num_workers=packing.num_workers,
            ),
            dtype=dtype,
            ranks=ranks,
        )

    def ask(self, images: Images, question: str, *, max_new_tokens: int = 256) -> str:
        """The answer to a question about an image file, several of them, or None."""
        return self.ask_all([(images, question)], max_new_tokens=max_new_tokens)[0]

    def ask_all(self, asked: Iterable[tuple[Images, str]], *, max_new_tokens: int = 256) -> list[str]:
        """The answers to pairs of images and a question, in order; images that several share are encoded once.

        Raises InputError for an image that cannot be read.
        """
        prompts = []
        for number, (images, question) in enumerate(asked, start=1):
            files = () if images is None else (images,) if isinstance(images, str | Path) else images
            turn = Turn(user=question, images=tuple(map(str, files)))
            prompts.append(Example(id=str(number), turns=(turn,), where=f"question:{number}"))
        found = self.answers(prompts, Scoring(), max_new_tokens=max_new_tokens, progress=False)
        return [prediction["prediction"] for prediction in found]

    def answers(
        self, prompts: Sequence[Example], scoring: Scoring, *, max_new_tokens: int, progress: bool = True
    ) -> list[Prediction]:
        """Predictions in the order of `prompts`, as `predict` makes them: every rank its share, and returns all."""
        return predict(
            self.model,
            self.processor,
            prompts,
            scoring,
            max_new_tokens=max_new_tokens,
            limits=self.limits,
            reading=self.reading,
            dtype=self.dtype,
            progress=progress,
            ranks=self.ranks,
        )

    def stream(self, turns: tuple[Turn, ...], sampling: Sampling, system: str = "") -> Generator[str, None, None]:
        """The answer to the last turn while it is written, as `stream.stream` yields it."""
        return stream(self.model, self.processor, turns, sampling, self.dtype, system=system)


load = Answerer.load  # `phi3v.load`


def model_folder(name: str | Path) -> str | Path:
    """The final model of a run folder; any other name is a model already. Raises InputError for an unfinished run."""
    folder = RunFolder(name)
    if folder.final.is_dir():
        return folder.final
    if folder.checkpoints.is_dir():
        raise InputError(f"{name} is an unfinished run: finish it with `phi3v train ... --out {name} --resume auto`")
    return name


def check_base(run: str | Path, base: str | None) -> None:
    """Raises InputError if `base` is not the model, if that was a folder, that a run was started from."""
    known = (RunFolder(run).environment.get("data") or {}).get("model")
    if base and known and Path(base).is_dir() and model_digest(Path(base)) != known:
        raise InputError(f"--base {base} is not the model that {run} was trained on: its files have another content")


def started_from(run: str | Path) -> str | None:
    """The model that a run was started from, as its settings name it; None for a folder that is no run's."""
    folder = RunFolder(run)
    return folder.config.base.model if folder.is_run and folder.final.is_dir() else None
