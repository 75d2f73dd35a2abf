"""NLVR2: is a sentence about two photographs true?

Task      'The first image is the image on the left, the second image is the image on the right. Given the left and
          right images, does the statement "..." hold true? Answer yes or no.' The answers are "Yes." and "No."; the
          Cauldron asks in eight wordings, of which this is one
Source    HuggingFaceM4/the_cauldron, nlvr2, up to two sentences a pair of photographs; or the release: train.json,
          dev.json, test1.json (github.com/lil-lab/nlvr, nlvr2, CC BY 4.0) with its photographs, for research on request
Split     the Cauldron's first 500 rows to evaluate on, the first sentence of each, and the rest to train on, as in the
          original recipe (all are of the release's train.json); of the release train.json, and dev.json to evaluate on,
          or test1.json without it
Turns     the original recipe makes the sentences about a pair turns of one conversation: the second is learnt with the
          first and its answer before it. `--turns branches` learns each by itself, as all are evaluated
Scores    accuracy; consistency, the share of sentences judged right with all their pairs, where the release tells which
          pairs go with a sentence
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from phi3v.base.config import Base, Keeping, Run
from phi3v.base.errors import InputError
from phi3v.data.hub import download
from phi3v.infer.metrics import sentence_of
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
from phi3v.recipes.table import Row, Table, TaskOptions, with_mode

PROMPT = (
    "The first image is the image on the left, the second image is the image on the right. "  # one of the Cauldron's
    'Given the left and right images, does the statement "{sentence}" hold true? Answer yes or no.'
)
ANSWERS = {"True": "Yes.", "False": "No."}
FORMS = (
    f"nlvr2/train-*.parquet ({CAULDRON})",
    "train.json, dev.json and their photographs, train-10000-0-img0.png for one (lil-lab/nlvr)",
)

TABLE = Table(
    command="phi3v train nlvr2",
    metric="accuracy",
    model="Phi-3.5-vision",
    rows=(
        Row(mode="full", learning_rate=1e-5, epochs=3, score=89.40),
        Row(mode="frozen", learning_rate=2e-5, epochs=2, score=89.20),
        Row(mode="lora", lora_rank=64, lora_alpha=128, learning_rate=2e-4, epochs=2),
        Row(mode="qlora", lora_rank=64, lora_alpha=128, learning_rate=2e-4, epochs=2),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """What the task can be asked for."""

    turns: Literal["turns", "branches"] = "turns"
    """turns: the sentences about a pair are one conversation, each sees those before. branches: each by itself."""

    eval_size: int = 500
    """Rows of the Cauldron, its first ones, that are evaluated on."""


def settings(options: Options = Options()) -> Run:
    """The run that learns the task; every value can be overridden."""
    run = Run(
        base=Base(model="microsoft/Phi-3.5-vision-instruct", num_crops=16),
        keeping=Keeping(out=Path("runs/nlvr2")),
    )
    return with_mode(run, TABLE, options.mode)


def prepare(run: Run, options: Options = Options()) -> Run:
    """The run on the data in the guide's format, which is made from what lies in --data-dir or on the Hub."""
    return with_converted(
        run,
        options,
        "nlvr2",
        partial(find, eval_size=options.eval_size),
        train="train" if options.turns == "turns" else "train-branches",
        eval_size=options.eval_size,
    )


# -- the data --------------------------------------------------------------------------------------------------------


def find(folder: Path | None, eval_size: int) -> list[Source]:
    """The data set in a folder, or on the Hub. Raises InputError, saying what is missing."""
    place = folder or download(CAULDRON, "nlvr2/*")
    if files := find_parquet(place, "train", CAULDRON_COLUMNS, "nlvr2"):
        return [cauldron(files, eval_size)]
    found = {split: file for split in ("train", "dev", "test1") if (file := find_file(place, f"{split}.json"))}
    if not found:
        raise nothing_found(place, "NLVR2", FORMS)
    return [release(place, split, file) for split, file in found.items()]


def cauldron(files: Sequence[Path], eval_size: int) -> Source:
    """The Cauldron's subset: every row has two photographs and the texts about them."""

    def records(number: int, where: str, images: list[bytes], texts: list[dict[str, str]]) -> Iterable[Record]:
        turns = [(text["user"], text["assistant"]) for text in texts]
        if unknown := {answer for _, answer in turns} - {*ANSWERS.values()}:
            raise InputError(f"{where}: unknown answer {min(unknown)!r}, expected Yes. or No.")
        split = "test" if number < eval_size else "train"
        pair = [NamedImage(f"{split}/{number}-{side}", content) for side, content in enumerate(images)]
        if split == "train":
            return learnt(f"train-{number}", pair, turns)
        return [Record(id=f"test-{number}", images=pair, turns=turns[:1], file="test")]

    return cauldron_source(files, "nlvr2", ["train", "train-branches", "test"], records, num_images=2)


def release(folder: Path, split: str, file: Path) -> Source:
    """A split of the release: every line is a sentence about the pair of photographs that its identifier names."""

    def rows() -> Rows:
        pairs: dict[str, list[tuple[str, tuple[str, str]]]] = {}  # of each its sentences: identifier and turn
        for where, line in read_lines(file, {"identifier": str, "sentence": str, "label": object}):
            if (answer := ANSWERS.get(str(line["label"]))) is None:
                raise InputError(f"{where}: unknown label {line['label']!r}, expected True or False")
            sentence = (line["identifier"], (PROMPT.format(sentence=line["sentence"]), answer))
            pairs.setdefault(line["identifier"].rpartition("-")[0], []).append(sentence)
        files = find_images(folder, (f"{pair}-img{side}.png" for pair in pairs for side in "01"), file)
        return len(pairs), ((pair, files, sentences) for pair, sentences in pairs.items())

    def records(name: str, files: dict[str, Path], sentences: list[tuple[str, tuple[str, str]]]) -> Iterable[Record]:
        pair = [NamedImage(f"{split}/{name}-img{side}", files[f"{name}-img{side}.png"]) for side in "01"]
        if split == "train":
            return learnt(name, pair, [turn for _, turn in sentences])
        return [
            Record(id=identifier, images=pair, turns=[turn], group=sentence_of(identifier), file=split)
            for identifier, turn in sentences
        ]

    splits = ["train", "train-branches"] if split == "train" else [split]
    return Source(name=f"NLVR2's {file.name}", files=[file], splits=splits, rows=rows, records=records)


def learnt(name: str, pair: Sequence[NamedImage], turns: Sequence[tuple[str, str]]) -> Iterator[Record]:
    """What is learnt of a pair: its sentences as turns of one conversation, and each by itself."""
    yield Record(id=name, images=pair, turns=turns, closed_turns=len(turns) > 1, file="train")
    for number, turn in enumerate(turns):
        yield Record(id=f"{name}-{number}", images=pair, turns=[turn], file="train-branches")
