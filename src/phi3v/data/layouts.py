"""Other layouts of data: JSON of LLaVA, ShareGPT and Hugging Face, tables, folders of classes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.encode import Example
from phi3v.data.schema import image_resolver, lines, read_record

Format = Literal["llava", "sharegpt", "messages", "csv", "imagefolder", "video-folder"]
FOLDERS = ("imagefolder", "video-folder")

Rows = Iterator[tuple[str, Any]]
"""(where something stands, a conversation as `turns_of` reads it, or the InputError that it cannot be read)."""

TAG = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
COLUMNS = ("image", "question", "answer")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}


def read(format: Format, source: Path, root: Path, question: str | None) -> Iterator[tuple[str, Example | InputError]]:
    """(origin, example) of everything in a source, or (origin, why it is none); images are paths below `root`.

    `question` is what is asked about folders of classes. Raises InputError if the source as a whole cannot be read.
    """
    resolve = image_resolver(source, root)
    if format == "csv":
        rows = csv_rows(source)
    elif format in FOLDERS:
        rows = class_rows(source, question, "image" if format == "imagefolder" else "video")
    else:
        rows = json_rows(source)
    try:
        for number, (where, value) in enumerate(rows, start=1):
            try:
                if isinstance(value, InputError):
                    raise value
                turns = turns_of(value)
                id = f"{source.stem}-{number}" if value.get("id") in (None, "") else str(value["id"])
                yield where, read_record({"id": id, "conversations": turns}, where, resolve)
            except InputError as error:
                yield where, error
    except OSError as error:
        raise InputError(f"{error.filename or source}: {error.strerror}") from error


def json_rows(file: Path) -> Rows:
    """The objects of a JSON array ("file, item n"), or of a file with one a line ("file:line")."""
    content = file.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from ((where, _parsed(line)) for where, line in lines(file))
    elif isinstance(values := _parsed(content), InputError):
        raise InputError(f"{file}: {values}")
    else:
        yield from ((f"{file}, item {number}", value) for number, value in enumerate(values, start=1))


def _parsed(content: bytes) -> Any:
    """The value of a JSON text, or the InputError that it is none."""
    try:
        return jsonfile.parse(content)
    except InputError as error:
        return error


def csv_rows(file: Path) -> Rows:
    """The rows of a table with a header, separated by commas or, in a .tsv, by tabs."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if missing := [name for name in COLUMNS if name not in reader.fieldnames]:
                raise InputError(f"{file}: no column {missing[0]!r} in its first line")
            for row in reader:
                whole = None not in row and None not in row.values()
                found = {"id": row.get("id"), **_record(*(row[name] for name in COLUMNS))} if whole else None
                yield f"{file}:{reader.line_num}", found or InputError("it has not as many cells as the first line")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start + 1}") from error
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: {error}") from error


def class_rows(folder: Path, question: str | None, kind: str) -> Rows:
    """A row for every file of every class, both in the order of their names, without hidden ones."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise InputError(f"{folder}: there are no folders in it, one a class")
    if {name.lower() for name in classes} <= SPLITS:
        raise InputError(f"{folder} holds splits ({', '.join(classes)}), not classes: convert each of them by itself")
    asked = question or f"Classify the {kind} into one of the following classes: {', '.join(classes)}."
    for name in classes:
        inside = (path.relative_to(folder) for path in (folder / name).rglob("*") if path.is_file())
        files = sorted(path for path in inside if not any(part.startswith(".") for part in path.parts))
        if not files:
            yield str(folder / name), InputError("there is nothing in it")
        for file in files:
            yield str(folder / file), _record(str(file), asked, name)


def _record(image: str, question: str, answer: str) -> dict[str, Any]:
    """A conversation as in JSON, text only if `image` is empty."""
    return {
        "image": image,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def turns_of(record: Any) -> list[dict[str, Any]]:
    """The turns, as our jsonl has them, of a conversation as LLaVA, ShareGPT or Hugging Face write it.

    conversations or messages: a list of {"from" or "role", "value" or "content"}; a content is a text, or a list of
    parts {"type": "text", "text"} and {"type": "image"}. Images are named in their parts, or in `images` or `image` of
    the record, in the order of the parts and `<image>` tags that need one.
    """
    turns = _field(record, list, "conversations", "messages")
    if unknown := {"video", "videos", "audio", "audios"} & record.keys():
        raise InputError(f"{min(unknown)}: only images are converted")
    listed = record.get("images") or record.get("image") or []
    waiting = iter(listed if isinstance(listed, list) else [listed])
    texts: list[tuple[str, str]] = []
    images: list[Any] = []
    for message in turns:
        text = ""
        content = _field(message, (str, list), "value", "content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = _field(part, str, "type")
            if kind == "text":
                piece = _field(part, str, "text")
                images += islice(waiting, piece.count(TAG))
                text += f"\n{piece}" if text.endswith(TAG) and not piece.startswith("\n") else piece
            elif kind in ("image", "image_url"):
                images += _image_of(part) or islice(waiting, 1)
                text += TAG
            else:
                raise InputError(f"a part of type {kind!r}: only text and image are converted")
        texts.append((ROLES.get(role := _field(message, str, "from", "role"), role), text))
    return _paired(texts, [*images, *waiting])


def _image_of(part: dict[str, Any]) -> list[Any]:
    """The image that a part names itself, if it does."""
    for key in ("image", "path", "url", "image_url"):
        value = part.get(key)
        if isinstance(value, dict):
            value = value.get("url") or value.get("path")
        if value:
            return [value.removeprefix("file://") if isinstance(value, str) else value]
    return []


def _field(record: Any, kind: type | tuple[type, ...], *names: str) -> Any:
    """The first of these fields that a record has. Raises InputError if there is none, or it is of another kind."""
    if not isinstance(record, dict):
        raise InputError(f"must be an object, not {jsonfile.KINDS.get(type(record), 'a number')}")
    for name in names:
        if name in record:
            if not isinstance(record[name], kind):
                raise InputError(f"{name} cannot be {jsonfile.KINDS.get(type(record[name]), 'a number')}")
            return record[name]
    raise InputError(f"{' or '.join(names)} is missing")


def _paired(texts: Sequence[tuple[str, str]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """The turns of a conversation of (role, text) and of its images, in order.

    Each `<image>` of the user takes the next image; without such tags, all images come first. A system text goes in
    front of the first question. Raises InputError if tags and images do not match or the roles do not take turns.
    """
    num_tags = sum(text.count(TAG) for _, text in texts)
    if any(TAG in text for role, text in texts if role != "user"):
        raise InputError("only the user shows images")
    if num_tags not in (0, len(images)):
        raise InputError(f"{num_tags} {TAG} tags, {len(images)} images")
    rest = iter(images)
    turns: list[dict[str, Any]] = []
    system: list[str] = []
    for role, text in texts:
        answered = not turns or "assistant" in turns[-1]
        if role == "system" and not turns:
            system.append(text)
        elif role == "user" and answered:
            shown = list(islice(rest, text.count(TAG) if num_tags else None))
            user = _numbered(text) if turns else "\n".join([*system, _numbered(text)])
            turns.append({"images": shown, "user": user})
        elif role == "assistant" and not answered:
            turns[-1]["assistant"] = text
        else:
            raise InputError(f"a message of {role!r} out of turn: user and assistant take turns, the user first")
    if turns and "assistant" not in turns[-1]:
        raise InputError("the last question has no answer")
    return turns


def _numbered(text: str) -> str:
    numbers = count(1)
    return re.sub(TAG, lambda _: f"<|image_{next(numbers)}|>", text)
