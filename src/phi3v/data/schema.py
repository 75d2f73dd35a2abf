"""The training data: one conversation a line, as JSON.

    {"id": "7", "source": "docvqa", "conversations": [{"images": ["7.png"], "user": "Who?", "assistant": "Ada."}, ...]}

`source` and `images` may be missing. Beside `conversations` there may be `answers`, all accepted answers of the last
turn; `group`, the name of examples that count as right only together; and `closed_turns`, true if every turn begins
with `<s>` and ends with `<|endoftext|>`, not just the whole conversation (as in the original recipe for NLVR2). Image
paths are relative to the image root, by default the folder `images` beside the file, and must not lead out of it. A
line becomes an `Example`, or is reported with everything that is wrong with it.

In a file of prompts, the last turn may lack its `assistant`, or have null or a blank text there.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.encode import Example, Turn, messages

EXAMPLE_KEYS: dict[str, type] = {
    "id": str,
    "source": str,
    "conversations": list,
    "answers": list,
    "group": str,
    "closed_turns": bool,
}
TURN_KEYS: dict[str, type] = {"images": list, "user": str, "assistant": str}
OPTIONAL_KEYS = frozenset({"source", "answers", "group", "closed_turns", "images"})

MAX_LINE_BYTES = 2**22
"""Longest line. A context of 131,072 tokens has 0.6 MB of English, or 1 MB of Chinese written as \\uXXXX."""

NAMES_KEPT = 2**16
"""Size of caches by image path while a file is read, since a page has many questions: about 20 MB at most."""


@dataclass(kw_only=True)
class Notes:
    """What is wrong with one line: problems make the data unfit for training, warnings do not."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_jsonl(path: str | Path, image_root: str | Path | None = None, *, prompts: bool = False) -> list[Example]:
    """All examples of a file; see `iter_jsonl`."""
    return list(iter_jsonl(path, image_root, prompts=prompts))


def iter_jsonl(path: str | Path, image_root: str | Path | None = None, *, prompts: bool = False) -> Iterator[Example]:
    """Yield the examples of a file. Raises InputError, "file:line: what is wrong", on the first problem.

    With `prompts` the last turn of each may lack its answer. Images become absolute paths inside the image root; they
    need not exist.
    """
    resolve = image_resolver(path, image_root)
    empty = True
    for where, line in lines(path):
        notes = Notes()
        example = parse(line, where, resolve, notes, prompts=prompts)
        if example is None or notes.problems:
            raise InputError(f"{where}: {notes.problems[0]}")
        yield example
        empty = False
    if empty:
        raise InputError(f"{path}: no examples")


def lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("file:line", content) of every line that is not blank. Raises InputError for one that is too long."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(f"{path}:{number}: longer than {MAX_LINE_BYTES / 2**20:.0f} MiB{_hint(line)}")
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def image_folder(path: str | Path, image_root: str | Path | None) -> Path:
    """The folder that the image paths in a data file are relative to."""
    return Path(path).parent / "images" if image_root is None else Path(image_root)


def image_resolver(path: str | Path, image_root: str | Path | None) -> Callable[[str], str]:
    """A function from an image's path in the data to its absolute path, symbolic links followed.

    It raises InputError if the path leads out of the image root, or the root is no folder.
    """
    root = image_folder(path, image_root)
    if image_root is not None and not root.is_dir():
        raise InputError(f"--image-root {root}: no such folder")
    real_root = os.path.realpath(root)

    @functools.lru_cache(NAMES_KEPT)
    def resolve(name: str) -> str:
        if not os.path.isdir(real_root):
            raise InputError(f"the image root {root} is no folder (--image-root)")
        try:
            resolved = os.path.realpath(os.path.join(real_root, name))
        except ValueError as error:
            raise InputError(f"image path {name!r}: {error}") from error
        if not resolved.startswith(os.path.join(real_root, "")):
            raise InputError(f"image path {name!r} leads out of the image root {root}")
        return resolved

    return resolve


def parse(
    line: bytes, where: str, resolve: Callable[[str], str], notes: Notes, *, prompts: bool = False
) -> Example | None:
    """The example on a line, or None if there is none. What is wrong goes to `notes`; a refused image path becomes "".

    With `prompts` its last turn may lack its answer.
    """
    try:
        record = jsonfile.parse(line)
    except InputError as error:
        notes.problems.append(f"{error}{_hint(line)}")
        return None
    if not _has_keys(record, "", EXAMPLE_KEYS, notes):
        return None
    if not record["id"]:
        notes.problems.append("id is empty")
    if not record["conversations"]:
        notes.problems.append("conversations is empty")
    turns = []
    for number, turn in enumerate(record["conversations"], start=1):
        name, optional = f"turn {number}: ", OPTIONAL_KEYS
        if prompts and number == len(record["conversations"]) and _is_open(turn):
            turn, optional = {key: turn[key] for key in turn if key != "assistant"}, OPTIONAL_KEYS | {"assistant"}
        if _has_keys(turn, name, TURN_KEYS, notes, optional):
            turns.append(_turn(turn, name, resolve, notes))
    answers = record.get("answers", [])
    if "answers" in record and not (answers and all(isinstance(answer, str) and answer.strip() for answer in answers)):
        notes.problems.append("answers must be a list of one or more texts that are not empty")
        answers = []
    if not turns or len(turns) < len(record["conversations"]):
        return None
    return Example(
        id=record["id"],
        source=record.get("source", ""),
        turns=tuple(turns),
        where=where,
        answers=tuple(answers),
        group=record.get("group", ""),
        closed_turns=record.get("closed_turns", False),
    )


def read_record(record: Mapping[str, object], where: str, resolve: Callable[[str], str]) -> Example:
    """The example on the line that a record would be. Raises InputError with everything that is wrong with it."""
    notes = Notes()
    example = parse(json.dumps(record).encode(), where, resolve, notes)
    if example is None or notes.problems:
        raise InputError("; ".join(notes.problems))
    messages(example)  # raises if its tags and images do not match
    return example


def _turn(turn: Mapping[str, object], name: str, resolve: Callable[[str], str], notes: Notes) -> Turn:
    images = []
    for image in turn.get("images", []):  # type: ignore[attr-defined]
        images.append("")  # a refused image keeps its place, since its tag is in the text
        if not isinstance(image, str) or not image:
            notes.problems.append(f"{name}images must hold paths, not {repr(image) if image == '' else _kind(image)}")
            continue
        try:
            images[-1] = resolve(image)
        except InputError as error:
            notes.problems.append(f"{name}{error}")
    user, assistant = str(turn["user"]), str(turn["assistant"]) if "assistant" in turn else None
    if assistant is not None and not assistant.strip():
        notes.problems.append(f"{name}the answer is empty")
    return Turn(user=user, assistant=assistant, images=tuple(images))


def _is_open(turn: object) -> bool:
    """Whether a turn has no answer yet."""
    answer = turn.get("assistant") if isinstance(turn, dict) else ...
    return answer is None or (isinstance(answer, str) and not answer.strip())


def _has_keys(
    record: object, name: str, keys: Mapping[str, type], notes: Notes, optional: Set[str] = OPTIONAL_KEYS
) -> bool:
    """Whether a JSON object has the keys it needs, with values of the right types; what is wrong goes to `notes`.

    An unknown key is a warning, or a problem if it looks like a misspelt one.
    """
    if not isinstance(record, dict):
        notes.problems.append(f"{name}must be an object, not {_kind(record)}")
        return False
    before = len(notes.problems)
    for key in sorted(record.keys() - keys.keys()):
        close = difflib.get_close_matches(key, keys.keys() - record.keys(), n=1, cutoff=0.75)
        if close:
            notes.problems.append(f"{name}unknown key {key!r}: did you mean {close[0]!r}?")
        else:
            notes.warnings.append(f"{name}unknown key {key!r} is ignored")
    for key, kind in keys.items():
        if key in record:
            if not isinstance(record[key], kind):
                notes.problems.append(f"{name}{key} must be {jsonfile.KINDS[kind]}, not {_kind(record[key])}")
        elif key not in optional:
            llava = " (from and value are LLaVA's keys; here a turn is user and assistant)" if "from" in record else ""
            notes.problems.append(f"{name}{key} is missing{llava}")
    return len(notes.problems) == before


def _hint(line: bytes) -> str:
    array = line.lstrip()[:1] == b"["
    return ": is the file one JSON array? Each line must hold one object" if array else ""


def _kind(value: object) -> str:
    return jsonfile.KINDS.get(type(value), "a number")
