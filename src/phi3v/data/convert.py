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
from phi3v.data.encode import Example
from phi3v.data.image import ImageInfo, read_info, read_size
from phi3v.data.layouts import FOLDERS, TAG, Format, read
from phi3v.data.split import split, twins
from phi3v.data.writer import DatasetWriter, writing

Taken = tuple[list[str], ImageInfo | None]
"""The names of the images that were written for a source file, and what is in the first of them."""


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
        val_fraction: Share of the examples that goes to val.jsonl, of every class if the answers are few. Those that
            show an image with the same content stay together.
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
        frames = num_frames if format == "video-folder" else None
        taken, failed = _take(examples, writer, root, frames, val_fraction > 0, progress)
        whole = []
        for example in examples:
            if error := next((failed[image] for image in example.images if image in failed), None):
                writer.leave_out(example.where, error)
            else:
                whole.append(example)
        if not whole:
            raise InputError(f"{source}: nothing to convert; {(writer.left_out or ['it is empty'])[0]}")
        contents = [[info.digest for image in example.images if (info := taken[image][1])] for example in whole]
        held_out = split(contents, [example.answers[0] for example in whole], val_fraction, seed)
        sides: list[dict[str, ImageInfo]] = [{}, {}]
        for example, held in zip(whole, held_out, strict=True):
            writer.add("val" if held else "train", _record(example, taken), example.where)
            sides[held] |= {image: info for image in example.images if (info := taken[image][1])}
    writer.summarize(out)
    kinds = twins(list(sides[1].values()), sides[0].values())
    if alike := [image for image, kind in zip(sides[1], kinds, strict=True) if kind]:
        what = f"{len(alike):,} images of val.jsonl (such as {alike[0]}) look nearly like one of train.jsonl"
        say(f"[yellow]warning[/]  {escape(what)}")


def _take(
    examples: Sequence[Example], writer: DatasetWriter, root: Path, num_frames: int | None, looks: bool, progress: bool
) -> tuple[dict[str, Taken], dict[str, InputError]]:
    """By source file, the images that were written for it, or why there are none; `looks`: and what is in the first."""
    files = list(dict.fromkeys(image for example in examples for image in example.images))
    real_root = os.path.realpath(root)

    def take(file: str) -> Taken | InputError:
        name, path = os.path.relpath(file, real_root), Path(file)
        try:
            if num_frames is not None:
                names = writer.put_frames(name, path, num_frames)
            else:
                read_size(path)
                names = [writer.put_image(name, path)]
            return names, read_info(writer.folder / "images" / names[0]) if looks else None
        except InputError as error:
            return error

    taken: dict[str, Taken] = {}
    failed: dict[str, InputError] = {}
    results = forked_map(take, files, min(num_cores(), len(files)), chunk=32 if num_frames is None else 1)
    with progress_bar("taking", len(files), "files", show=progress) as advance:
        for file, result in zip(files, results, strict=True):
            if isinstance(result, InputError):
                failed[file] = result
            else:
                taken[file] = result
            advance(1)
    return taken, failed


def _record(example: Example, taken: Mapping[str, Taken]) -> dict[str, object]:
    """The line of an example, given the names of what was written for its images."""
    turns = [
        {
            "images": [name for image in turn.images for name in taken[image][0]],
            "user": turn.user,
            "assistant": turn.assistant,
        }
        for turn in example.turns
    ]
    return {"id": example.id, "conversations": turns}
