"""From a published data set, in whatever form it lies on the disk or the Hub, to the guide's jsonl with its images.

A recipe finds `Source`s; what they hold is written to a folder with train.jsonl, others beside it, and images/. The one
invariant: a folder with `made_from.json` is whole, and was made from exactly what that file says. Images are never
decoded: those in parquet files are written byte for byte, those that are files already get a second name.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from phi3v.base.config import Run
from phi3v.base.console import progress_bar
from phi3v.base.errors import InputError
from phi3v.base.files import locked, make_folder
from phi3v.base.jsonfile import read_object
from phi3v.data.writer import DatasetWriter, suffix_of, writing
from phi3v.recipes.table import TaskOptions

MADE_FROM = "made_from.json"
EVALUATED = ("test", "dev", "test1")
"""The jsonl files a run may be evaluated on; of several, the first."""

FORMAT = 1
"""Raise it when the same data is converted to something else than before."""

HEAD_START_S = 2.0
"""Head start of the first rank when all want to convert the same data: it is the one that prints."""


class NamedImage(NamedTuple):
    """An image to write: its name below images/, without suffix, and its bytes or the file it is."""

    name: str
    content: bytes | Path


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of jsonl whose images are still to be written. Images of the same name are the same and written once."""

    id: str
    images: Sequence[NamedImage]
    turns: Sequence[tuple[str, str]]
    """(user, assistant); the images belong to the first."""
    answers: Sequence[str] = ()
    group: str = ""
    closed_turns: bool = False
    file: str
    """Name of the jsonl, without suffix."""


Rows = tuple[int, Iterable[tuple[Any, ...]]]
"""Number of rows, and the rows."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some files of a data set, and what they become."""

    name: str
    files: Sequence[Path]
    splits: Sequence[str]
    """Names of the jsonl files that it writes, without suffix."""
    rows: Callable[[], Rows]
    """Opens the files."""
    records: Callable[..., Iterable[Record]]
    """`records(*row)` are the lines that a row becomes."""


def with_converted(
    run: Run,
    options: TaskOptions,
    name: str,
    find: Callable[[Path | None], Sequence[Source]],
    *,
    train: str = "train",
    **choices: object,
) -> Run:
    """The run on the converted data, unless it has data of its own; the data is converted if that was not done before.

    `find` gets --data-dir, or None for the Hub. `train` names the jsonl to train on, and `choices` is what else decides
    what is written. Of several processes one converts and the others wait. Raises InputError if the data is not what it
    should be, the folder holds something else, or the disk is full.
    """
    if run.data.train and run.data.eval:
        return run
    folder = folder_for(options, name)
    made_from: dict[str, Any] = {"format": FORMAT, "name": name, **choices}
    if options.data_dir is None:
        convert_once(folder, name, {**made_from, "files": "Hugging Face Hub"}, lambda: find(None))
    else:
        if not options.data_dir.is_dir():
            raise InputError(f"--data-dir {options.data_dir}: no such folder")
        sources = find(options.data_dir)
        splits = {split for source in sources for split in source.splits}
        for flag, wanted in (("train", {"train"}), ("eval", {*EVALUATED})):
            if not getattr(run.data, flag) and not wanted & splits:
                there = ", ".join(source.name for source in sources)
                raise InputError(f"{options.data_dir} holds only {there}: give --{flag}, or add what it lacks")
        files = [file for source in sources for file in source.files]
        sizes = {str(file.relative_to(options.data_dir)): file.stat().st_size for file in files}
        convert_once(folder, name, {**made_from, "files": sizes}, lambda: sources)
    learnt = run.data.train or _first(folder, train, "train")
    return replace(run, data=replace(run.data, train=learnt, eval=run.data.eval or _first(folder, *EVALUATED)))


def _first(folder: Path, *names: str) -> tuple[Path, ...]:
    return tuple(file for name in names if (file := folder / f"{name}.jsonl").exists())[:1]


def folder_for(options: TaskOptions, name: str) -> Path:
    """The folder of the converted data: --converted-dir, else phi3v/NAME in --data-dir, else data/NAME."""
    if options.converted_dir is not None:
        return options.converted_dir
    if options.data_dir is not None:
        beside = options.data_dir / "phi3v" / name
        if (beside / MADE_FROM).exists() or os.access(options.data_dir, os.W_OK):
            return beside
    return Path("data") / name


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is making the folder, and keep others from it."""
    make_folder(folder.parent)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(HEAD_START_S)
    with locked(folder.with_name(f".{folder.name}.lock"), f"waiting for another process to make {folder}", wait=True):
        yield


def _is_made(folder: Path, made_from: Mapping[str, Any]) -> bool:
    if not folder.exists():
        return False
    if not (folder / MADE_FROM).is_file():
        raise InputError(f"{folder} holds something else: choose another --converted-dir")
    if read_object(folder / MADE_FROM) != json.loads(json.dumps(made_from)):
        raise InputError(
            f"{folder} was converted from other files or with other options (see {MADE_FROM} there): remove it, or "
            "choose another --converted-dir"
        )
    return True


def convert_once(folder: Path, name: str, made_from: Mapping[str, Any], find: Callable[[], Sequence[Source]]) -> None:
    """Convert what `find` finds, unless the folder is there already; one process does, the others wait.

    Raises InputError if the folder was made from something else.
    """
    if _is_made(folder, made_from):
        return
    with alone(folder):
        if _is_made(folder, made_from):
            return
        with writing(folder, name) as writer:
            for source in find():
                _write(source, writer)
            (writer.folder / MADE_FROM).write_text(json.dumps(made_from, indent=1), encoding="utf-8")


def _write(source: Source, writer: DatasetWriter) -> None:
    num_rows, rows = source.rows()
    names: dict[str, str] = {}
    with progress_bar(f"converting {source.name}", num_rows, "rows") as advance:
        for row in rows:
            for record in source.records(*row):
                for image in record.images:
                    if image.name not in names:
                        names[image.name] = writer.put_image(image.name + suffix_of(image.content), image.content)
                writer.add(record.file, _line(record, names), f"{source.name}: {record.id}")
            advance(1)
    if empty := [split for split in source.splits if split not in writer.lines]:
        raise InputError(f"{source.name}: of its {num_rows:,} rows none is left for {empty[0]}.jsonl")


def _line(record: Record, names: Mapping[str, str]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"user": user, "assistant": assistant} for user, assistant in record.turns]
    turns[0] = {"images": [names[image.name] for image in record.images], **turns[0]}
    more = {key: value for key in ("answers", "group", "closed_turns") if (value := getattr(record, key))}
    return {"id": record.id, "conversations": turns, **more}
