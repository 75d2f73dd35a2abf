"""The training data: one conversation a line, as JSON.

    {"id": "7", "source": "docvqa", "conversations": [{"images": ["7.png"], "user": "Who?", "assistant": "Ada."}, ...]}

`source` and `images` may be missing. Beside `conversations` there may be `system`, a text in front of the first turn;
`answers`, all accepted answers of the last turn; `group`, the name of examples that count as right only together; and
`closed_turns`, true if every turn begins with `<s>` and ends with `<|endoftext|>`, not just the whole conversation (as
in the original recipe for NLVR2). The answer of a turn with `"loss": false` is read, but not learned or scored. Image
paths are relative to the image root, by default the folder `images` beside the file, and must not lead out of it. A
line becomes an `Example`, or is reported with everything that is wrong with it.

In a file of prompts, the last turn may lack its `assistant`, or have null or a blank text there.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.encode import Example, Turn, messages
from phi3v.data.tags import is_image_key, names_image


class Line(msgspec.Struct):
    """The object on a line."""

    id: Annotated[str, Meta(min_length=1)]
    conversations: Annotated[list[Turn], Meta(min_length=1)]
    source: str = ""
    system: str = ""
    answers: tuple[str, ...] = ()
    group: str = ""
    closed_turns: bool = False


KEYS, TURN_KEYS = Line.__annotations__.keys(), Turn.__annotations__.keys()

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


def image_resolver(
    path: str | Path, image_root: str | Path | None, others: Sequence[Path] = ()
) -> Callable[[str], str]:
    """A function from an image's path in the data to its absolute path, symbolic links followed.

    It raises InputError if the path leads out of the image root and of `others`, or the root is no folder.
    """
    root = image_folder(path, image_root)
    if image_root is not None and not root.is_dir():
        raise InputError(f"--image-root {root}: no such folder")
    real_root = os.path.realpath(root)
    allowed = tuple(os.path.join(os.path.realpath(folder), "") for folder in (root, *others))

    @functools.lru_cache(NAMES_KEPT)
    def resolve(name: str) -> str:
        if not os.path.isdir(real_root):
            raise InputError(f"the image root {root} is no folder (--image-root)")
        try:
            resolved = os.path.realpath(os.path.join(real_root, name))
        except ValueError as error:
            raise InputError(f"image path {name!r}: {error}") from error
        if not resolved.startswith(allowed):
            raise InputError(f"image path {name!r} leads out of the image root {root}, to {resolved}")
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
        _check_keys(record, notes)
        fields = jsonfile.convert(record, Line, "")
    except InputError as error:
        notes.problems.append(f"{error}{_hint(line)}")
        return None
    turns = []
    for number, turn in enumerate(fields.conversations, start=1):
        name = f"turn {number}: "
        answer = turn.assistant if turn.assistant and turn.assistant.strip() else None
        if answer is None and not (prompts and number == len(fields.conversations)):
            notes.problems.append(f"{name}the answer is missing")
        images = tuple(_resolved(image, resolve, name, notes) for image in turn.images)
        turns.append(replace(turn, assistant=answer, images=images))
    if not any(turn.loss for turn in fields.conversations):
        notes.problems.append("no turn carries loss")
    if not all(answer.strip() for answer in fields.answers):
        notes.problems.append("answers holds a blank text")
    return Example(
        id=fields.id,
        source=fields.source,
        system=fields.system,
        turns=tuple(turns),
        where=where,
        answers=fields.answers,
        group=fields.group,
        closed_turns=fields.closed_turns,
    )


def read_record(
    record: Mapping[str, object], where: str, resolve: Callable[[str], str], *, prompts: bool = False
) -> Example:
    """The example on the line that a record would be. Raises InputError with everything that is wrong with it."""
    notes = Notes()
    example = parse(json.dumps(record).encode(), where, resolve, notes, prompts=prompts)
    if example is None or notes.problems:
        raise InputError("; ".join(notes.problems))
    messages(example)  # raises if its tags and images do not match
    return example


def _resolved(image: str, resolve: Callable[[str], str], name: str, notes: Notes) -> str:
    try:
        return resolve(image)
    except InputError as error:
        notes.problems.append(f"{name}{error}")
        return ""  # it keeps its place, since its tag is in the text


def _check_keys(record: object, notes: Notes) -> None:
    """Note keys that are unknown: as a warning, or as a problem if they look like misspelt ones or hold an image."""
    given = record if isinstance(record, dict) else {}
    turns = given.get("conversations")
    turns = [turn if isinstance(turn, dict) else {} for turn in turns] if isinstance(turns, list) else []
    shows = any(turn.get("images") for turn in turns)
    objects = [("", given, KEYS), *((f"turn {number}: ", turn, TURN_KEYS) for number, turn in enumerate(turns, 1))]
    for name, keys, known in objects:
        for key in sorted(keys.keys() - known):
            if close := difflib.get_close_matches(key, known - keys.keys(), n=1, cutoff=0.75):
                notes.problems.append(f"{name}unknown key {key!r}: did you mean {close[0]!r}?")
            elif keys[key] and (is_image_key(key) or (names_image(keys[key]) and not shows)):
                notes.problems.append(f"{name}unknown key {key!r} holds an image: it belongs into 'images' of a turn")
            else:
                notes.warnings.append(f"{name}unknown key {key!r} is ignored")


def _hint(line: bytes) -> str:
    if line.lstrip()[:1] == b"[":
        return ": is the file one JSON array? Each line must hold one object"
    return " (from and value are LLaVA's keys: see phi3v convert llava)" if b'"from"' in line else ""
