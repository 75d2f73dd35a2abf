"""MY TASK in one line: a template for your own recipe.

    phi3v recipes forkme > my_task.py
    phi3v train --recipe my_task.py --data-dir my_data --mode lora

Task      what the model sees, what it is asked, and what the answers look like
Source    where the data comes from, and its license; here a folder with train.csv and test.csv, whose lines are
          image,question,answer (images relative to the folder)
Split     the data to train on and to evaluate on
Scores    the scores reached, and with which settings
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phi3v.base.config import Base, Data, Keeping, Run
from phi3v.base.errors import InputError
from phi3v.recipes.conversion import NamedImage, Record, Rows, Source, with_converted
from phi3v.recipes.sources import find_file, nothing_found, with_keys
from phi3v.recipes.table import Row, Table, TaskOptions, with_mode

NAME = "my-task"
COLUMNS = {"image": str, "question": str, "answer": str}

TABLE = Table(  # --mode takes the settings of its row; record what works for you here, with its score
    command="phi3v train --recipe my_task.py",
    metric="accuracy",
    model="Phi-3.5-vision",
    rows=(
        Row(mode="full", learning_rate=1e-5, epochs=3),
        Row(mode="frozen", learning_rate=2e-5, epochs=3),
        Row(mode="lora", lora_rank=64, learning_rate=2e-4, epochs=2),
        Row(mode="qlora", lora_rank=64, learning_rate=2e-4, epochs=2),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """The options of the task: each field is a flag, and its docstring the help text."""

    hint: str = "Answer briefly."
    """Text that follows every question."""


def settings(options: Options = Options()) -> Run:
    """The run that trains on the task; a flag overrides each value."""
    run = Run(
        base=Base(model="microsoft/Phi-3.5-vision-instruct", num_crops=16),
        data=Data(batch_size=16),
        keeping=Keeping(out=Path("runs") / NAME),
    )
    return with_mode(run, TABLE, options.mode)


def prepare(run: Run, options: Options = Options()) -> Run:
    """The run on the data in the guide's format. It is converted once for each set of the options given by name."""
    return with_converted(run, options, NAME, partial(find, hint=options.hint), hint=options.hint)


# -- the data --------------------------------------------------------------------------------------------------------


def find(folder: Path | None, hint: str) -> list[Source]:
    """The data in a folder. Raises InputError, naming what is missing."""
    place = folder or Path("my_data")  # without --data-dir; `data.hub.download` fetches a data set from the Hub
    found = {split: file for split in ("train", "test") if (file := find_file(place, f"{split}.csv"))}
    if not found:
        raise nothing_found(place, NAME, ["train.csv and test.csv"])
    return [table(split, file, hint) for split, file in found.items()]


def table(split: str, file: Path, hint: str) -> Source:
    """A split, each line of which is a question about an image."""

    def rows() -> Rows:
        with open(file, newline="", encoding="utf-8") as stream:
            lines = [with_keys(line, COLUMNS, f"{file}, line {n}") for n, line in enumerate(csv.DictReader(stream), 2)]
        return len(lines), enumerate(lines)

    def records(number: int, line: dict[str, str]) -> Sequence[Record]:
        image = file.parent / line["image"]
        if not image.is_file():
            raise InputError(f"{file}: {image} is missing")
        turn = (f"{line['question']}\n{hint}", line["answer"])
        return [
            Record(id=f"{split}-{number}", images=[NamedImage(f"{split}/{number}", image)], turns=[turn], file=split)
        ]

    return Source(name=file.name, files=[file], splits=[split], rows=rows, records=records)
