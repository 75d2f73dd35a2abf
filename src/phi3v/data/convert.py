"""Your own data as the guide's jsonl: other layouts read, pictures linked, pages split, and nothing lost in silence.

What a line may hold is decided in one place, `data.schema`: every example goes through it, and what it refuses is
listed with its origin and the reason. The folder appears whole or not at all.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape

from phi3v.base import jsonfile
from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError, one_line
from phi3v.base.files import written_whole
from phi3v.data.encode import Example, messages
from phi3v.data.image import read_size
from phi3v.data.schema import Notes, image_resolver, lines, parse
from phi3v.data.video import sample_frames

Format = Literal["llava", "sharegpt", "messages", "csv", "imagefolder", "video-folder"]
Rows = Iterator[tuple[str, Any]]
"""Where something stands, "file:line", and what: an InputError if it cannot be read."""
Take = Callable[[Path, Path], list[Path]]
"""Makes what the model sees of a source file, at (or beside) the given place; returns the files it made."""

TAG = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
COLUMNS = ("image", "question", "answer")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}
NOT_FILES = ("http:", "https:", "data:")
NUM_SHOWN = 5  # reasons on the terminal; the rest is in the file


def convert(
    format: Format,
    source: Path,
    /,
    *,
    out: Path,
    image_root: Path | None = None,
    question: str | None = None,
    num_frames: int = 8,
    val_fraction: float = 0.0,
    seed: int = 42,
    progress: bool = True,
) -> None:
    """Turn data of another layout into jsonl to train on.

    Writes train.jsonl, val.jsonl (if asked for), images/, and not_converted.txt, which says what was left out and why.
    Pictures are linked where possible, else copied, and not yet decoded: that is what `phi3v check` is for.

    Args:
        format: llava, sharegpt, messages: JSON, an array or an object a line, whose texts hold `<image>` tags or are
            lists of parts. csv: columns image, question, answer and perhaps id. imagefolder, video-folder: a folder of
            pictures or videos for every class.
        source: The file, or the folder that holds the folders.
        out: The folder to make.
        image_root: Folder the image paths in SOURCE are relative to, and may not lead out of. Default: SOURCE's own.
        question: What is asked of class folders. Default: to classify, with all classes named.
        num_frames: Frames of a video, at equal distances.
        val_fraction: Share of the examples that goes to val.jsonl. Those that share an image stay together.
        seed: Of the choice of those examples.
        progress: Show a progress bar.
    """
    folders = format in ("imagefolder", "video-folder")
    if not 0 <= val_fraction < 1:
        raise InputError(f"--val-fraction is {val_fraction}, it must be at least 0 and below 1")
    if num_frames < 1:
        raise InputError(f"--num-frames is {num_frames}, it must be at least 1")
    if question is not None and (not folders or TAG in question):
        raise InputError(f"--question is for folders of classes, and without {TAG}: the pictures come before it")
    if image_root is not None and folders:
        raise InputError(f"--image-root has no effect on {format}: the pictures are those in {source}")
    if not (source.is_dir() if folders else source.is_file()):
        raise InputError(f"{source}: no such {'folder' if folders else 'file'}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out} is there already: choose another folder")

    root = source if folders else image_root or source.parent
    try:
        found, problems = read(format, source, root, question)
    except OSError as error:
        raise InputError(f"{error.filename or source}: {error.strerror}") from error
    with written_whole(out) as folder:
        files = list(dict.fromkeys(image for example in found for image in example.images))
        take = partial(_frames, num_frames=num_frames) if format == "video-folder" else _link
        taken = _take(files, Path(os.path.realpath(root)), folder / "images", take, progress)
        examples = []
        for example in found:
            try:
                examples.append(_placed(example, taken))
            except InputError as error:
                problems.append(one_line(f"{example.where}: {error}"))
        if not examples:
            raise InputError(f"{source}: nothing to convert; {problems[0] if problems else 'it is empty'}")
        held_out = split([example.images for example in examples], val_fraction, seed)
        texts: dict[str, list[str]] = {"train.jsonl": [], "val.jsonl": [], "not_converted.txt": problems}
        for example, held in zip(examples, held_out, strict=True):
            texts["val.jsonl" if held else "train.jsonl"].append(_line(example))
        for name, listed in texts.items():
            if listed:
                (folder / name).write_text("".join(f"{text}\n" for text in listed), encoding="utf-8")
    for name, listed in texts.items():
        if listed:
            say(f"{len(listed):>9,}  {escape(str(out / name))}")
    for problem in problems[:NUM_SHOWN]:
        say(f"[bold]not converted[/]  {escape(problem)}")


def _line(example: Example) -> str:
    turns = [{"images": turn.images, "user": turn.user, "assistant": turn.assistant} for turn in example.turns]
    return json.dumps({"id": example.id, "source": example.source, "conversations": turns}, ensure_ascii=False)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(format: Format, source: Path, root: Path, question: str | None) -> tuple[list[Example], list[str]]:
    """The examples of a source, with the absolute paths of their pictures (or videos), and what is none, and why.

    Raises InputError when the source as a whole cannot be read.
    """
    if format == "csv":
        rows = csv_rows(source)
    elif format in ("imagefolder", "video-folder"):
        rows = class_rows(source, question, "image" if format == "imagefolder" else "video")
    else:
        rows = json_rows(source)
    resolve = image_resolver(source, root)
    examples, problems = [], []
    for number, (where, value) in enumerate(rows, start=1):
        notes = Notes()
        try:
            if isinstance(value, InputError):
                raise value
            line = {"id": f"{source.stem}-{number}", "source": source.stem, "conversations": turns_of(value)}
            if value.get("id") not in (None, ""):
                line["id"] = str(value["id"])
            example = parse(json.dumps(line).encode(), where, resolve, notes)
            if example is None or notes.problems:
                raise InputError("; ".join(notes.problems))
            messages(example)  # its tags and images match
            examples.append(example)
        except InputError as error:
            problems.append(one_line(f"{where}: {error}"))
    return examples, problems


def json_rows(file: Path) -> Rows:
    """The objects of a JSON array ("file, item n"), or one a line ("file:line")."""
    with open(file, "rb") as stream:
        array = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not array:
        for where, line in lines(file):
            try:
                yield where, jsonfile.parse(line)
            except InputError as error:
                yield where, error
        return
    try:
        values = jsonfile.parse(file.read_bytes())
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    yield from ((f"{file}, item {number}", value) for number, value in enumerate(values, start=1))


def csv_rows(file: Path) -> Rows:
    """The rows of a table with a header, separated by commas or, in a .tsv, by tabs."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in COLUMNS if name not in header]:
                raise InputError(f"{file}: no column {missing[0]!r} in its first line ({', '.join(header)})")
            first = reader.line_num + 1
            for cells in reader:
                if len(cells) == len(header):
                    row = dict(zip(header, cells, strict=True))
                    yield f"{file}:{first}", {"id": row.get("id"), **_record(*(row[name] for name in COLUMNS))}
                elif cells:
                    yield f"{file}:{first}", InputError(f"{len(cells)} cells, the first line has {len(header)}")
                first = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start + 1}") from error
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: {error}") from error


def class_rows(folder: Path, question: str | None, kind: str) -> Rows:
    """A row for every file of every class, both in the order of their names; hidden ones are no data."""
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
    """A conversation as in JSON; without an image it is text only."""
    return {
        "image": image,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def turns_of(record: Any) -> list[dict[str, Any]]:
    """The turns of a conversation as LLaVA, ShareGPT or Hugging Face write it.

    conversations or messages: a list of {"from" or "role", "value" or "content"}; a content is a text, or a list of
    parts {"type": "text", "text"} and {"type": "image"}. Images stand in their parts, or, in the order of the parts and
    `<image>` tags that want one, in the record's `images` or `image`.
    """
    said = _field(record, list, "conversations", "messages")
    if unknown := {"video", "videos", "audio", "audios"} & record.keys():
        raise InputError(f"{min(unknown)}: only images are converted")
    listed = record.get("images") or record.get("image") or []
    waiting = iter(listed if isinstance(listed, list) else [listed])
    texts: list[tuple[str, str]] = []
    images: list[Any] = []
    for message in said:
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
    """The image that a part names itself: at most one."""
    for key in ("image", "path", "url", "image_url"):
        value = part.get(key)
        if isinstance(value, dict):
            value = value.get("url") or value.get("path")
        if value:
            return [value.removeprefix("file://") if isinstance(value, str) else value]
    return []


def _field(record: Any, kind: type | tuple[type, ...], *names: str) -> Any:
    """The first of these fields that a record has. Raises InputError if it is no record, has none, or another kind."""
    if not isinstance(record, dict):
        raise InputError(f"must be an object, not {jsonfile.KINDS.get(type(record), 'a number')}")
    for name in names:
        if name in record:
            if not isinstance(record[name], kind):
                raise InputError(f"{name} cannot be {jsonfile.KINDS.get(type(record[name]), 'a number')}")
            return record[name]
    raise InputError(f"{' or '.join(names)} is missing")


def _paired(said: Sequence[tuple[str, str]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """The turns of (role, text) and of the images of the whole conversation, in order.

    Each `<image>` of the user's takes the next image; without any of them, all images come first. Texts of a system
    go in front of the first question. Raises InputError when that does not come out even.
    """
    num_tags = sum(text.count(TAG) for _, text in said)
    if any(TAG in text for role, text in said if role != "user"):
        raise InputError("only the user shows images")
    if num_tags not in (0, len(images)):
        raise InputError(f"{num_tags} {TAG} tags, {len(images)} images")
    if outside := [image for image in images if isinstance(image, str) and image.startswith(NOT_FILES)]:
        raise InputError(f"{outside[0][:80]} is no file: save it beside the data, and give its path")
    rest = iter(images)
    turns: list[dict[str, Any]] = []
    system: list[str] = []
    for role, text in said:
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


# -- pictures ----------------------------------------------------------------------------------------------------------


def _take(
    files: Sequence[str], root: Path, folder: Path, take: Take, progress: bool
) -> dict[str, list[str] | InputError]:
    """What was made of each file, as paths relative to `folder`, or why nothing was; they all lie in `root`."""

    def made(file: str) -> list[str] | InputError:
        target = folder / os.path.relpath(file, root)
        try:
            return [str(name.relative_to(folder)) for name in take(Path(file), target)]
        except InputError as error:
            return error

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        with progress_bar("taking", len(files), "files", show=progress) as advance:
            taken = {}
            for file, names in zip(files, pool.map(made, files), strict=True):
                taken[file] = names
                advance(1)
            return taken
    finally:
        pool.shutdown(cancel_futures=True)


def _link(file: Path, target: Path) -> list[Path]:
    """A second name for a picture, or a copy of it."""
    read_size(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:  # another file system, or somebody else's file
        shutil.copyfile(file, target)
    return [target]


def _frames(file: Path, target: Path, *, num_frames: int) -> list[Path]:
    """Pictures of a video, named like it and numbered."""
    pictures = sample_frames(file, num_frames)
    target.parent.mkdir(parents=True, exist_ok=True)
    names = [target.with_name(f"{target.name}.{number}.jpg") for number in range(num_frames)]
    for picture, name in zip(pictures, names, strict=True):
        picture.save(name)
    return names


def _placed(example: Example, taken: Mapping[str, list[str] | InputError]) -> Example:
    """The example with what was made of its pictures. Raises the InputError of the first of which nothing was."""

    def made(image: str) -> list[str]:
        names = taken[image]
        if isinstance(names, InputError):
            raise names
        return names

    turns = (
        replace(turn, images=tuple(name for image in turn.images for name in made(image))) for turn in example.turns
    )
    return replace(example, turns=tuple(turns))


# -- splitting ---------------------------------------------------------------------------------------------------------


def split(images: Sequence[Sequence[str]], fraction: float, seed: int) -> list[bool]:
    """Which examples are held out, from the images of each: no image is on both sides.

    Examples that are connected by common images are taken together, at random, as long as they fit in the fraction.
    Raises InputError if none are left on one of the sides.
    """
    if fraction == 0:
        return [False] * len(images)
    leader = list(range(len(images)))  # of each example one that it is connected with, in the end the first of all

    def first(example: int) -> int:
        while leader[example] != example:
            leader[example] = example = leader[leader[example]]
        return example

    shown_by: dict[str, int] = {}
    for example, shown in enumerate(images):
        for image in shown:
            one, other = sorted((first(example), first(shown_by.setdefault(image, example))))
            leader[other] = one
    groups: dict[int, list[int]] = {}
    for example in range(len(images)):
        groups.setdefault(first(example), []).append(example)

    generator = random.Random(seed)
    left = round(fraction * len(images))
    held_out = [False] * len(images)
    for group in sorted(groups.values(), key=lambda _: generator.random()):
        if len(group) <= left:
            left -= len(group)
            for example in group:
                held_out[example] = True
    if len(set(held_out)) < 2:
        raise InputError(
            f"--val-fraction {fraction} is impossible: images connect {len(images)} examples to {len(groups)} groups"
        )
    return held_out
