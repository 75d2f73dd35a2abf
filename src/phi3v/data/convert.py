"""`phi3v convert`: data of another layout as jsonl to train on, with a reason for everything that is left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi3v.base.console import progress_bar
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, Fraction, check_values
from phi3v.base.pool import forked_map, num_cores
from phi3v.data.encode import Example
from phi3v.data.image import read_size
from phi3v.data.layouts import FOLDERS, TAG, Format, read
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
    num_frames: int = 8,
    val_fraction: float = 0.0,
    seed: int = 42,
    progress: bool = True,
) -> None:
    """Turn data of another layout into jsonl to train on.

    Writes train.jsonl, val.jsonl (if asked for), images/, and not_converted.txt, which says what was left out and why.
    Images are linked where possible, else copied, and not yet decoded: that is what `phi3v check` is for.

    Args:
        format: llava, sharegpt, messages: JSON, an array or an object a line, whose texts hold `<image>` tags or are
            lists of parts. csv: columns image, question, answer and perhaps id. imagefolder, video-folder: a folder of
            images or videos for every class.
        source: The file, or the folder that holds the folders.
        out: The folder to make.
        image_root: Folder the image paths are relative to, and may not lead out of. Default: the file's own.
        question: The question about class folders. Default: to classify, naming all classes.
        num_frames: Frames of a video, at equal distances.
        val_fraction: Share of the examples that goes to val.jsonl. Those that share an image stay together.
        seed: Seed of that choice.
        progress: Show a progress bar.
    """
    folders = format in FOLDERS
    values = {"val-fraction": val_fraction, "num-frames": num_frames}
    check_values("--", values, {"val-fraction": Fraction, "num-frames": Count})
    if question is not None and (not folders or TAG in question):
        raise InputError(f"--question is for folders of classes, and without {TAG}: the images come before it")
    if image_root is not None and folders:
        raise InputError(f"--image-root has no effect on {format}: the images are those in {source}")
    if not (source.is_dir() if folders else source.is_file()):
        raise InputError(f"{source}: no such {'folder' if folders else 'file'}")

    root = source if folders else image_root or source.parent
    with writing(out, source.stem) as writer:
        examples: list[Example] = []
        for where, found in read(format, source, root, question):
            if isinstance(found, InputError):
                writer.leave_out(where, found)
            else:
                examples.append(found)
        names, failed = _take(examples, writer, root, num_frames if format == "video-folder" else None, progress)
        whole = []
        for example in examples:
            if error := next((failed[image] for image in example.images if image in failed), None):
                writer.leave_out(example.where, error)
            else:
                whole.append(example)
        if not whole:
            raise InputError(f"{source}: nothing to convert; {(writer.left_out or ['it is empty'])[0]}")
        held_out = split([example.images for example in whole], val_fraction, seed)
        for example, held in zip(whole, held_out, strict=True):
            writer.add("val" if held else "train", _record(example, names), example.where)
    writer.summarize(out)


def _take(
    examples: Sequence[Example], writer: DatasetWriter, root: Path, num_frames: int | None, progress: bool
) -> tuple[dict[str, list[str]], dict[str, InputError]]:
    """By source file, the names of the images that were written for it, or why there are none."""
    files = list(dict.fromkeys(image for example in examples for image in example.images))
    real_root = os.path.realpath(root)

    def take(file: str) -> list[str] | InputError:
        name, path = os.path.relpath(file, real_root), Path(file)
        try:
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
        }
        for turn in example.turns
    ]
    return {"id": example.id, "conversations": turns}
