"""From a published data set, in whatever form it lies on the disk or the Hub, to the guide's jsonl with its pictures.

A recipe finds `Source`s; what they hold is written to a folder with train.jsonl, others beside it, and images/. The one
invariant: a folder with `made_from.json` is whole, and was made from exactly what that file says. Pictures are never
decoded: those in parquet files are written out byte for byte, those that are files already get a second name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from phi3v.base.config import Run
from phi3v.base.console import progress_bar
from phi3v.base.errors import InputError
from phi3v.base.files import make_folder, written_whole
from phi3v.base.jsonfile import read_object
from phi3v.recipes.table import TaskOptions

MADE_FROM = "made_from.json"
EVALUATED = ("test", "dev", "test1")
"""The jsonl files a run may be evaluated on; of several, the first."""

FORMAT = 1
"""Raised when the same data would be converted to something else than before."""

HEAD_START_S = 2.0
"""Of the first rank, when all want to convert the same data."""

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}
"""Of pictures that are bytes, by how they begin; for the eye only, since pictures are read by their content."""


class Picture(NamedTuple):
    """A picture: where it goes below images/, without suffix, and its bytes or the file it is."""

    name: str
    content: bytes | Path


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of jsonl whose pictures are still to be written. A picture of a name that was written is the same one."""

    id: str
    pictures: Sequence[Picture]
    turns: Sequence[tuple[str, str]]
    """(user, assistant); the pictures belong to the first."""
    answers: Sequence[str] = ()
    group: str = ""
    closed_turns: bool = False
    file: str
    """Name of the jsonl, without suffix."""


Rows = tuple[int, Iterator[Iterable[Record]]]
"""Number of rows, and the records of each."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some files of a data set, and what becomes of them."""

    name: str
    files: Sequence[Path]
    splits: Sequence[str]
    """Names of the jsonl files that it writes, without suffix."""
    open: Callable[[], Rows]


def each(opened: tuple[int, Iterator[Any]], records: Callable[..., Iterable[Record]]) -> Rows:
    """What `Source.open` gives: the number of rows, and of each row, a tuple, what `records` makes of it."""
    num_rows, rows = opened
    return num_rows, (records(*row) for row in rows)


def with_converted(
    run: Run,
    options: TaskOptions,
    name: str,
    find: Callable[[Path | None], Sequence[Source]],
    *,
    train: str = "train",
    **choices: object,
) -> Run:
    """The run on the converted data, as far as it has no data of its own; it is converted if that was not done yet.

    `find` gets --data-dir, or None for the Hub. `train` names the jsonl to train on, if there is one of that name, and
    `choices` is what else decides what is written. Of several processes one converts and the others wait for it.
    Raises InputError when the data is not what it should be, the folder holds something else, or the disk is full.
    """
    if run.data.train and run.data.eval:
        return run
    folder = folder_for(options, name)
    made_from: dict[str, Any] = {"format": FORMAT, "name": name, **choices}
    if options.data_dir is None:
        _convert(folder, name, {**made_from, "files": "Hugging Face Hub"}, lambda: find(None))
    else:
        if not options.data_dir.is_dir():
            raise InputError(f"--data-dir {options.data_dir}: no such folder")
        sources = find(options.data_dir)
        splits = {split for source in sources for split in source.splits}
        for flag, wanted in (("train", {"train"}), ("eval", {*EVALUATED})):
            if getattr(run.data, flag) is None and not wanted & splits:
                there = ", ".join(source.name for source in sources)
                raise InputError(f"{options.data_dir} holds only {there}: give --{flag}, or add what it lacks")
        files = [file for source in sources for file in source.files]
        sizes = {str(file.relative_to(options.data_dir)): file.stat().st_size for file in files}
        _convert(folder, name, {**made_from, "files": sizes}, lambda: sources)
    learnt = run.data.train or _first(folder, train, "train")
    return replace(run, data=replace(run.data, train=learnt, eval=run.data.eval or _first(folder, *EVALUATED)))


def _first(folder: Path, *names: str) -> Path | None:
    return next((file for name in names if (file := folder / f"{name}.jsonl").exists()), None)


def folder_for(options: TaskOptions, name: str) -> Path:
    """Where the converted data of that name goes: --converted-dir, else phi3v/NAME in --data-dir, else data/NAME."""
    if options.converted_dir is not None:
        return options.converted_dir
    if options.data_dir is not None:
        beside = options.data_dir / "phi3v" / name
        if (beside / MADE_FROM).exists() or os.access(options.data_dir, os.W_OK):
            return beside
    return Path("data") / name


@contextmanager
def converting(folder: Path, made_from: Mapping[str, Any]) -> Iterator[Path | None]:
    """None if the folder is there, else a temporary one that becomes it when the block is done, and never before.

    One process at a time; the others wait. Raises InputError when the folder was made from something else.
    """
    if _is_made(folder, made_from):
        yield None
        return
    with alone(folder):
        if _is_made(folder, made_from):
            yield None
            return
        with written_whole(folder) as unfinished:
            yield unfinished
            (unfinished / MADE_FROM).write_text(json.dumps(made_from, indent=1), encoding="utf-8")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Of all processes that want to make the folder only this one."""
    make_folder(folder.parent)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(HEAD_START_S)  # the first rank is the one that shows its progress and says what is wrong
    try:
        lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # it goes with the process, however that ends
        yield
    finally:
        os.close(lock)


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


def _convert(folder: Path, name: str, made_from: Mapping[str, Any], find: Callable[[], Sequence[Source]]) -> None:
    with converting(folder, made_from) as unfinished:
        if unfinished is not None:
            for source in find():
                _write(source, name, unfinished)


def _write(source: Source, task: str, folder: Path) -> None:
    num_rows, rows = source.open()
    names: dict[str, str] = {}
    with ExitStack() as stack, progress_bar(f"converting {source.name}", num_rows, "rows") as advance:
        streams: dict[str, IO[str]] = {}
        for records in rows:
            for record in records:
                if record.file not in streams:
                    file = folder / f"{record.file}.jsonl"
                    streams[record.file] = stack.enter_context(open(file, "a", encoding="utf-8"))
                for picture in record.pictures:
                    if picture.name not in names:
                        names[picture.name] = _write_picture(picture, folder / "images")
                streams[record.file].write(_line(record, task, names))
            advance(1)
    if empty := [split for split in source.splits if split not in streams]:
        raise InputError(f"{source.name}: of its {num_rows:,} rows none is left for {empty[0]}.jsonl")


def _line(record: Record, task: str, names: Mapping[str, str]) -> str:
    turns: list[dict[str, Any]] = [{"user": user, "assistant": assistant} for user, assistant in record.turns]
    turns[0] = {"images": [names[picture.name] for picture in record.pictures], **turns[0]}
    line: dict[str, Any] = {"id": record.id, "source": task, "conversations": turns}
    for key in ("answers", "group", "closed_turns"):
        if value := getattr(record, key):
            line[key] = value
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write_picture(picture: Picture, root: Path) -> str:
    """Writes or links a picture and returns its path relative to the root."""
    content = picture.content
    if isinstance(content, Path):
        suffix = content.suffix
    else:
        suffix = next((suffix for start, suffix in SUFFIXES.items() if content.startswith(start)), ".img")
    file = root / f"{picture.name}{suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        try:
            os.link(content, file)
        except OSError:  # another file system, or somebody else's file
            shutil.copyfile(content, file)
    return str(file.relative_to(root))
