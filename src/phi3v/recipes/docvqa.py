"""DocVQA: questions about scanned pages of documents.

Task      "what is the date mentioned in this letter?\\nAnswer briefly."; the answer is a text on the page, "1/8/93"
Source    nielsr/docvqa_1200_examples, the mini set; HuggingFaceM4/the_cauldron, docvqa; or the challenge's own files,
          train_v1.0_withQT.json and val_v1.0_withQT.json with documents/ (rrc.cvc.uab.es, for research)
Split     the mini set's 1,000 questions to train on and 200 to evaluate on; with --full-train the Cauldron's 39,463
          questions about 10,194 pages to train on and the mini set's 200 to evaluate on, as in the original recipe; of
          the challenge train and val
Prompts   the original recipe trains on the Cauldron's prompts, the question and one of eleven ways to ask for brevity,
          but evaluates with "Answer briefly."; here this is the one prompt, unless `--prompts original`
Answers   all accepted answers of a question count in the scores; the first is learnt
Scores    ANLS, the original recipe's and the official one; published for --full-train
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from phi3v.base.config import Base, Data, Keeping, Run
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import read_object
from phi3v.data.hub import download
from phi3v.recipes.conversion import NamedImage, Record, Rows, Source, with_converted
from phi3v.recipes.sources import (
    CAULDRON,
    CAULDRON_COLUMNS,
    cauldron_source,
    find_file,
    find_images,
    find_parquet,
    image_bytes,
    nothing_found,
    parquet_source,
    with_keys,
)
from phi3v.recipes.table import FROZEN_LEARNT_LITTLE, Row, Table, TaskOptions, with_mode

PROMPT = "{question}\nAnswer briefly."

CAULDRON_HINTS = (
    "Ensure brevity in your answer.",
    "Give a very brief answer.",
    "Keep it short and to the point.",
    "Make the answer very short.",
    "Offer a terse response.",
    "Offer a very short reply.",
    "Provide a short and direct response.",
    "Provide a succinct answer.",
    "Your answer should be compact.",
    "Your answer should be very brief.",
    "Your response must be concise.",
)

MINI = "nielsr/docvqa_1200_examples"
MINI_COLUMNS = ("id", "image", "query", "answers")
CHALLENGE_KEYS = {"questionId": object, "question": str, "image": str, "answers": list}
FORMS = (
    f"data/train-*.parquet and test-*.parquet ({MINI})",
    f"docvqa/train-*.parquet ({CAULDRON})",
    "train_v1.0_withQT.json, val_v1.0_withQT.json and documents/ (rrc.cvc.uab.es)",
)

TABLE = Table(
    command="phi3v train docvqa --full-train",
    metric="ANLS",
    model="Phi-3-vision",
    rows=(
        Row(mode="full", dtype="bf16", learning_rate=5e-6, epochs=2, score=83.65),
        Row(mode="full", dtype="fp16", learning_rate=5e-6, epochs=2, score=82.60),
        Row(mode="frozen", dtype="bf16", learning_rate=1e-4, epochs=2, score=79.19, note=FROZEN_LEARNT_LITTLE),
        Row(mode="frozen", dtype="fp16", learning_rate=1e-4, epochs=2, score=78.74, note=FROZEN_LEARNT_LITTLE),
        Row(mode="lora", dtype="bf16", lora_rank=32, lora_alpha=16, learning_rate=2e-4, epochs=2, score=82.46),
        Row(mode="lora", dtype="fp16", lora_rank=32, lora_alpha=16, learning_rate=2e-4, epochs=2, score=82.34),
        Row(mode="qlora", dtype="bf16", lora_rank=32, lora_alpha=16, learning_rate=2e-4, epochs=2, score=81.85),
        Row(mode="qlora", dtype="fp16", lora_rank=32, lora_alpha=16, learning_rate=2e-4, epochs=2, score=81.85),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """What the task can be asked for."""

    full_train: bool = False
    """Train on all of DocVQA, not on the mini set. Where --data-dir holds no mini set, that is what happens anyway."""

    prompts: Literal["one", "original"] = "one"
    """one: the same prompt in training and evaluation. original: the Cauldron's own prompts in training."""


def settings(options: Options = Options()) -> Run:
    """The run that learns the task; every value can be overridden."""
    run = Run(
        base=Base(model="microsoft/Phi-3-vision-128k-instruct", num_crops=16),
        data=Data(questions="expected"),
        keeping=Keeping(out=Path("runs/docvqa")),
    )
    return with_mode(run, TABLE, options.mode)


def prepare(run: Run, options: Options = Options()) -> Run:
    """The run on the data in the guide's format, which is made from what lies in --data-dir or on the Hub."""
    return with_converted(
        run,
        options,
        "docvqa-full" if options.full_train else "docvqa",
        partial(find, full_train=options.full_train),
        train="train-original" if options.prompts == "original" else "train",
    )


# -- the data --------------------------------------------------------------------------------------------------------


def find(folder: Path | None, full_train: bool) -> list[Source]:
    """What is learnt and what is asked, from a folder or the Hub. Raises InputError, saying what is missing."""
    if folder is None:
        small = mini(download(MINI, "data/*"))
        large = [cauldron(download(CAULDRON, "docvqa/*"))] if full_train else []
    else:
        small, large = mini(folder), [cauldron(folder), challenge(folder)]
        if not any((small, *large)):
            raise nothing_found(folder, "DocVQA", FORMS)
        if full_train and not any(large):
            raise InputError(f"--full-train: {folder} holds only the mini set")
    forms = large if full_train else [small, *large]
    learnt = next((form for form in forms if "train" in form), {})
    asked = next((form for form in (learnt, small, *large) if "test" in form), {})
    return [source for source in (learnt.get("train"), asked.get("test")) if source]


def mini(folder: Path) -> dict[str, Source]:
    """The mini set: every row has a page, a question in five languages and its answers.

    Every row is a page of its own, also where two show the same one: the row is the original recipe's unit.
    """

    def records(split: str, number: int, where: str, row: dict[str, Any]) -> Sequence[Record]:
        page = NamedImage(f"{split}/{number}", image_bytes(row["image"], where))
        return [question(row["id"], page, row["query"]["en"], row["answers"], split, where)]

    found = {split: find_parquet(folder, split, MINI_COLUMNS) for split in ("train", "test")}
    return {
        split: parquet_source(f"{MINI}, {split}", files, MINI_COLUMNS, [split], partial(records, split))
        for split, files in found.items()
        if files
    }


def cauldron(folder: Path) -> dict[str, Source]:
    """The Cauldron's subset, of DocVQA's training split: every row has a page and all texts about it."""
    files = find_parquet(folder, "train", CAULDRON_COLUMNS, "docvqa")

    def records(number: int, where: str, images: list[bytes], texts: list[dict[str, str]]) -> Iterator[Record]:
        pages = [NamedImage(f"train/{number}", images[0])]
        for index, text in enumerate(texts):
            asked, answer = text["user"], text["assistant"]
            without_hint, _, hint = asked.rpartition("\n")
            plain = without_hint if hint.strip() in CAULDRON_HINTS else asked
            for file, prompt in (("train", PROMPT.format(question=plain)), ("train-original", asked)):
                yield Record(id=f"train-{number}-{index}", images=pages, turns=[(prompt, answer)], file=file)

    return (
        {"train": cauldron_source(files, "docvqa", ["train", "train-original"], records, num_images=1)} if files else {}
    )


def challenge(folder: Path) -> dict[str, Source]:
    """The challenge's own files: every question names the file of its page."""

    def rows(file: Path) -> Rows:
        asked = with_keys(read_object(file), {"data": list}, f"{file}")["data"]
        asked = [with_keys(row, CHALLENGE_KEYS, f"{file}, question {number}") for number, row in enumerate(asked)]
        pages = find_images(folder, (Path(row["image"]).name for row in asked), file)
        return len(asked), ((pages[Path(row["image"]).name], row) for row in asked)

    def records(split: str, file: Path, page: Path, row: dict[str, Any]) -> Sequence[Record]:
        image = NamedImage(f"{split}/{page.stem}", page)
        return [question(row["questionId"], image, row["question"], row["answers"], split, f"{file}")]

    names = {"train": "train_v1.0_withQT.json", "test": "val_v1.0_withQT.json"}
    found = {split: find_file(folder, name) for split, name in names.items()}
    return {
        split: Source(
            name=f"DocVQA's {file.name}",
            files=[file],
            splits=[split],
            rows=partial(rows, file),
            records=partial(records, split, file),
        )
        for split, file in found.items()
        if file
    }


def question(id: object, page: NamedImage, text: str, answers: Iterable[Any], split: str, where: str) -> Record:
    """One question with all its accepted answers."""
    accepted = [answer for answer in answers or () if isinstance(answer, str) and answer.strip()]
    if not accepted:
        raise InputError(f"{where}: question {id} has no answer")
    turn = (PROMPT.format(question=text), accepted[0])
    return Record(id=f"{split}-{id}", images=[page], turns=[turn], answers=accepted, file=split)
