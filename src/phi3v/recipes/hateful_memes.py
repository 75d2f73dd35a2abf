"""Hateful Memes: does a meme, by image and caption together, promote hate?

Task      "Does this meme promote hate speech?\\nAnswer yes or no." The answers are "Yes." and "No."; the Cauldron asks
          in eleven wordings, of which this is one
Source    HuggingFaceM4/the_cauldron, hateful_memes; or the challenge's own files, train.jsonl and dev_seen.jsonl with
          img/ (hatefulmemeschallenge.com, under Meta's license for research)
Split     the Cauldron's first 500 rows to evaluate on and the rest to train on, as in the original recipe (both are of
          the challenge's train.jsonl); of the challenge train.jsonl and dev_seen.jsonl
Scores    accuracy; area under the ROC curve from the log-probabilities of the two answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phi3v.base.config import Base, Evaluation, Keeping, Run
from phi3v.base.errors import InputError
from phi3v.data.hub import download
from phi3v.recipes.conversion import NamedImage, Record, Rows, Source, with_converted
from phi3v.recipes.sources import (
    CAULDRON,
    CAULDRON_COLUMNS,
    cauldron_source,
    find_file,
    find_images,
    find_parquet,
    nothing_found,
    read_lines,
)
from phi3v.recipes.table import FROZEN_LEARNT_LITTLE, Row, Table, TaskOptions, with_mode

PROMPT = "Does this meme promote hate speech?\nAnswer yes or no."
ANSWERS = ("No.", "Yes.")  # by label
FORMS = (
    f"hateful_memes/train-*.parquet ({CAULDRON})",
    "train.jsonl, dev_seen.jsonl and img/ (the challenge's own files)",
)

TABLE = Table(
    command="phi3v train hateful-memes",
    metric="accuracy",
    model="Phi-3-vision",
    rows=(
        Row(mode="full", dtype="bf16", learning_rate=5e-5, epochs=2, score=86.4),
        Row(mode="full", dtype="fp16", learning_rate=5e-5, epochs=2, score=85.4),
        Row(mode="frozen", dtype="bf16", learning_rate=1e-4, epochs=3, score=79.4, note=FROZEN_LEARNT_LITTLE),
        Row(mode="frozen", dtype="fp16", learning_rate=1e-4, epochs=3, score=78.6, note=FROZEN_LEARNT_LITTLE),
        Row(mode="lora", dtype="bf16", lora_rank=128, lora_alpha=256, learning_rate=2e-4, epochs=2, score=86.6),
        Row(mode="lora", dtype="fp16", lora_rank=128, lora_alpha=256, learning_rate=2e-4, epochs=2, score=85.2),
        Row(mode="qlora", dtype="bf16", lora_rank=128, lora_alpha=256, learning_rate=2e-4, epochs=2, score=84.0),
        Row(mode="qlora", dtype="fp16", lora_rank=128, lora_alpha=256, learning_rate=2e-4, epochs=2, score=83.8),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """What the task can be asked for."""

    eval_size: int = 500
    """Rows of the Cauldron, its first ones, that are evaluated on."""


def settings(options: Options = Options()) -> Run:
    """The run that learns the task; every value can be overridden."""
    run = Run(
        base=Base(model="microsoft/Phi-3-vision-128k-instruct", num_crops=16),
        evaluation=Evaluation(score="both"),  # the curve needs the log-probabilities of both answers
        keeping=Keeping(out=Path("runs/hateful-memes")),
    )
    return with_mode(run, TABLE, options.mode)


def prepare(run: Run, options: Options = Options()) -> Run:
    """The run on the data in the guide's format, which is made from what lies in --data-dir or on the Hub."""
    return with_converted(
        run,
        options,
        "hateful-memes",
        partial(find, eval_size=options.eval_size),
        eval_size=options.eval_size,
    )


# -- the data --------------------------------------------------------------------------------------------------------


def find(folder: Path | None, eval_size: int) -> list[Source]:
    """The data set in a folder, or on the Hub. Raises InputError, saying what is missing."""
    place = folder or download(CAULDRON, "hateful_memes/*")
    if files := find_parquet(place, "train", CAULDRON_COLUMNS, "hateful_memes"):
        return [cauldron(files, eval_size)]
    names = {"train": ("train.jsonl",), "test": ("dev_seen.jsonl", "dev.jsonl")}
    found = {split: file for split, choices in names.items() if (file := find_file(place, *choices))}
    if not found:
        raise nothing_found(place, "Hateful Memes", FORMS)
    return [challenge(split, file) for split, file in found.items()]


def cauldron(files: Sequence[Path], eval_size: int) -> Source:
    """The Cauldron's subset: every row has a meme and a question about it."""

    def records(number: int, where: str, images: list[bytes], texts: list[dict[str, str]]) -> Sequence[Record]:
        turn = (texts[0]["user"], texts[0]["assistant"])
        if turn[1] not in ANSWERS:
            raise InputError(f"{where}: unknown answer {turn[1]!r}, expected Yes. or No.")
        split = "test" if number < eval_size else "train"
        meme = NamedImage(f"{split}/{number}", images[0])
        return [Record(id=f"{split}-{number}", images=[meme], turns=[turn], file=split)]

    return cauldron_source(files, "hateful_memes", ["train", "test"], records, num_images=1)


def challenge(split: str, file: Path) -> Source:
    """A split of the challenge: every line is a meme with its label, 1 if it is hateful."""

    def rows() -> Rows:
        lines = list(read_lines(file, {"id": object, "img": str, "label": object}))
        memes = find_images(file.parent, (Path(line["img"]).name for _, line in lines), file)
        return len(lines), ((where, memes[Path(line["img"]).name], line) for where, line in lines)

    def records(where: str, meme: Path, line: dict[str, Any]) -> Sequence[Record]:
        if line["label"] not in (0, 1):
            raise InputError(f"{where}: unknown label {line['label']!r}, expected 0 or 1")
        turn = (PROMPT, ANSWERS[int(line["label"])])
        return [Record(id=f"{line['id']}", images=[NamedImage(f"{split}/{meme.stem}", meme)], turns=[turn], file=split)]

    return Source(name=f"Hateful Memes' {file.name}", files=[file], splits=[split], rows=rows, records=records)
