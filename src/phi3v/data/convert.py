"""`phi3v convert`: data of another layout as jsonl to train on, with a reason for everything that is left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, Fraction, check_values
from phi3v.base.pool import forked_map, num_cores
from phi3v.data.check import counted
from phi3v.data.encode import Example
from phi3v.data.image import read_size
from phi3v.data.layouts import FOLDERS, TAG, Format, Source, read
from phi3v.data.layouts.source import ASKED
from phi3v.data.split import split
from phi3v.data.writer import DatasetWriter, writing


def convert(
    format: Format,
    source: Path,
    /,
    *,
    out: Path,
    image_root: Path | None = None,
    question: str | None = None,
    columns: str = "",
    ignore: str = "",
    delimiter: str | None = None,
    encoding: str | None = None,
    num_frames: int = 8,
    val_fraction: float = 0.0,
    seed: int = 42,
    progress: bool = True,
) -> None:
    """Turn data of another layout into jsonl to train on.

    Writes train.jsonl, val.jsonl and test.jsonl (if the source has them, or for --val-fraction), images/,
    not_converted.txt, which says what was left out and why, and not_used.txt, the keys that were dropped. Images are
    linked where possible, else copied, and not yet decoded: that is what `phi3v check` is for.

    Args:
        format: llava, sharegpt, messages: JSON, an array or an object a line, whose texts hold `<image>` tags or are
            lists of parts. csv: columns image, question, answer and perhaps id. imagefolder, video-folder: a folder of
            images or videos for every class.
        source: The file, or the folder that holds the folders.
        out: The folder to make.
        image_root: Folder the image paths are relative to, and may not lead out of. Default: the file's own.
        question: The question about what has none. Default: for class folders to classify, naming all classes; for
            captions to describe.
        columns: Which keys or columns are which, where they have other names: image=photo,question=q,answer=a.
        ignore: Keys or columns that may be dropped although they change what a record says, separated by commas.
        delimiter: What separates the cells of a table. Default: what its first line has most of.
        encoding: Encoding of a table. Default: UTF-8 or UTF-16, else that of Windows (cp1252).
        num_frames: Frames of a video, at equal distances.
        val_fraction: Share of the examples that goes to val.jsonl. Those that share an image stay together.
        seed: Seed of that choice.
        progress: Show a progress bar.
    """
    folders = format in FOLDERS
    values = {"val-fraction": val_fraction, "num-frames": num_frames}
    check_values("--", values, {"val-fraction": Fraction, "num-frames": Count})
    if question is not None and TAG in question:
        raise InputError(f"--question is without {TAG}: the images come before it")
    if image_root is not None and folders:
        raise InputError(f"--image-root has no effect on {format}: the images are those in {source}")
    if not (source.is_dir() if folders else source.is_file()):
        raise InputError(f"{source}: no such {'folder' if folders else 'file'}")

    root = source if folders else image_root or source.parent
    with writing(out, source.stem) as writer:
        data = Source(
            path=source,
            root=root,
            others=[writer.images],
            put=writer.put_bytes,
            question=question,
            columns=_columns(columns),
            ignore=ignore.split(","),
            delimiter=delimiter,
            encoding=encoding,
        )
        examples: list[Example] = []
        sides: list[str] = []
        for row in read(format, data):
            if isinstance(row.value, InputError):
                writer.leave_out(row.where, row.value)
            else:
                examples.append(row.value)
                sides.append(row.split)
        names, failed = _take(examples, writer, root, num_frames if format == "video-folder" else None, progress)
        whole: list[tuple[str, Example]] = []
        for side, example in zip(sides, examples, strict=True):
            if error := next((failed[image] for image in example.images if image in failed), None):
                writer.leave_out(example.where, error)
            else:
                whole.append((side, example))
        if not whole:
            raise InputError(f"{source}: nothing to convert; {(writer.left_out or ['it is empty'])[0]}")
        if val_fraction and any(side == "val" for side, _ in whole):
            raise InputError(f"--val-fraction has no effect: {source} has a validation split")
        held = iter(split([example.images for side, example in whole if side == "train"], val_fraction, seed))
        for side, example in whole:
            side = "val" if side == "train" and next(held) else side
            writer.add(side, _record(example, names), example.where)
        if question and not any(note.startswith(ASKED) for note in data.notes):
            raise InputError("--question has no effect: every record has its own question")
        writer.not_used = [f"{key}: {counted(number, 'record')}" for key, number in data.unused.most_common()]
        bare = sum(not example.images for _, example in whole)
    writer.summarize(out)
    for note, number in data.notes.most_common():
        say(f"{number:>9,}  {escape(note)}")
    if bare:
        say(f"[yellow]{bare:>9,}[/]  of {counted(len(whole), 'example')} without an image")


def _columns(pairs: str) -> dict[str, str]:
    """Our names of columns by theirs, of "image=photo,question=q"."""
    named = [pair.partition("=") for pair in pairs.split(",") if pair]
    if wrong := next((ours + equals + theirs for ours, equals, theirs in named if not (ours and theirs)), None):
        raise InputError(f"--columns {wrong}: it must be as in image=photo,question=q,answer=a")
    return {theirs: ours for ours, _, theirs in named}


def _take(
    examples: Sequence[Example], writer: DatasetWriter, root: Path, num_frames: int | None, progress: bool
) -> tuple[dict[str, list[str]], dict[str, InputError]]:
    """By source file, the names of the images that were written for it, or why there are none."""
    files = list(dict.fromkeys(image for example in examples for image in example.images))
    real_root, written = os.path.realpath(root), os.path.realpath(writer.images)

    def take(file: str) -> list[str] | InputError:
        name, path = os.path.relpath(file, real_root), Path(file)
        try:
            if file.startswith(written + os.sep):
                read_size(path)
                return [path.name]
            if num_frames is not None:
                return writer.put_frames(name, path, num_frames)
            read_size(path)
            return [writer.put_image(name, path)]
        except InputError as error:
            return error

    names: dict[str, list[str]] = {}
    failed: dict[str, InputError] = {}
    results = forked_map(take, files, min(num_cores(), len(files)), chunk=32 if num_frames is None else 1)
    with progress_bar("taking", len(files), "files", show=progress) as advance:
        for file, result in zip(files, results, strict=True):
            if isinstance(result, InputError):
                failed[file] = result
            else:
                names[file] = result
            advance(1)
    return names, failed


def _record(example: Example, names: Mapping[str, list[str]]) -> dict[str, object]:
    """The line of an example, given the names of what was written for its images."""
    turns = [
        {
            "images": [name for image in turn.images for name in names[image]],
            "user": turn.user,
            "assistant": turn.assistant,
            **({} if turn.loss else {"loss": False}),
        }
        for turn in example.turns
    ]
    answers = {"answers": example.answers} if example.answers != (example.turns[-1].assistant,) else {}
    return {
        "id": example.id,
        **({"system": example.system} if example.system else {}),
        "conversations": turns,
        **answers,
    }
