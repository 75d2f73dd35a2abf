"""`phi3v convert`: data of another layout as jsonl to train on, with a reason for everything that is left out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from tyro.conf import arg

from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, Fraction, check_values
from phi3v.base.pool import forked_map, num_cores
from phi3v.data.check import counted
from phi3v.data.encode import Example
from phi3v.data.hub import download
from phi3v.data.image import ImageInfo, read_info, read_size
from phi3v.data.layouts import LAYOUTS, Format, read, recognize
from phi3v.data.layouts.record import TAG
from phi3v.data.layouts.source import ASKED, Reading, Row, Source
from phi3v.data.split import split, twins
from phi3v.data.writer import DatasetWriter, writing

NUM_SHOWN, MAX_SHOWN = 3, 400
"""Records that are shown before and after, if their layout was recognized, and characters of each."""

Taken = tuple[list[str], ImageInfo | None]
"""The names of the images that were written for a source file, and what is in the first of them."""


def convert(
    layout: Format | Path,  # type: ignore[valid-type]
    source: Path | None = None,
    /,
    *,
    out: Path,
    image_root: Path | None = None,
    reading: Annotated[Reading, arg(name="")] = Reading(),
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
        layout: How the data is laid out; docs/data.md shows each. Without it, it is recognized, and examples are shown.
        source: The file or folder, perhaps a zip archive; for parquet also a data set on the Hub.
        out: The folder to make.
        image_root: Folder the image paths are relative to, and may not lead out of. Default: the file's own. For an
            archive, a folder in it.
        num_frames: Frames of a video, at equal distances.
        val_fraction: Share of the examples that goes to val.jsonl, of every class if the answers are few. Those that
            show an image with the same content stay together.
        seed: Seed of that choice.
        progress: Show a progress bar.
    """
    place = Path(layout) if source is None else source
    named = None if source is None else str(layout)
    if named is not None and named not in LAYOUTS:
        raise InputError(f"{named} is no layout: it must be {', '.join(LAYOUTS)}")
    values = {"val-fraction": val_fraction, "num-frames": num_frames}
    check_values("--", values, {"val-fraction": Fraction, "num-frames": Count})
    if len(reading.delimiter or ",") != 1:
        raise InputError(f"--delimiter {reading.delimiter!r}: it must be one character")
    if TAG in (reading.question or ""):
        raise InputError(f"--question is without {TAG}: the images come before it")
    found = place
    if named == "parquet" and not place.exists():
        found = download(str(place), "*.parquet", flag="its path")
    if not found.exists():
        raise InputError(f"{place}: no such file or folder")

    with writing(out, place.stem) as writer:
        unpacked = writer.folder / ".unpacked"

        def leave_out(where: str, error: InputError) -> None:  # an archive is known by its own name
            writer.leave_out(where.replace(str(unpacked), str(place)), str(error).replace(str(unpacked), str(place)))

        if zipped := found.suffix == ".zip":
            found, image_root = _unpacked(found, unpacked), unpacked / image_root if image_root else None
        if named is None or zipped:
            recognized, found, why = recognize(found)
            say(f"{escape(str(place))}: layout [bold]{named or recognized}[/], because {escape(why)}")
        chosen = named or recognized
        if image_root is not None and found.is_dir():
            raise InputError(f"--image-root has no effect on a folder: the images are those in {place}")
        data = Source(found, found if found.is_dir() else image_root or found.parent, writer.put_bytes, reading)
        rows: list[Row] = []
        for row in read(chosen, data, writer.images):
            if isinstance(row.value, InputError):
                leave_out(row.where, row.value)
            else:
                rows.append(row if len(rows) < NUM_SHOWN else row._replace(raw=None))
        images = list(dict.fromkeys(image for row in rows for image in row.value.images))
        frames = num_frames if chosen == "video-folder" else None
        taken, failed = _take(images, writer, data.root, frames, val_fraction > 0, progress)
        whole: list[Row] = []
        for row in rows:
            if wrong := next((failed[image] for image in row.value.images if image in failed), None):
                leave_out(row.where, wrong)
            else:
                whole.append(row)
        if not whole:
            raise InputError(f"{place}: nothing to convert; {(writer.left_out or ['it is empty'])[0]}")
        if val_fraction and any(row.split == "val" for row in whole):
            raise InputError(f"--val-fraction has no effect: {place} has a validation split")
        if reading.question and not any(note.startswith(ASKED) for note in data.notes):
            raise InputError("--question has no effect: every record has its own question")
        dividing = [row.value for row in whole if row.split == "train"]
        contents = [[info.digest for image in one.images if (info := taken[image][1])] for one in dividing]
        held = iter(split(contents, [one.answers[0] for one in dividing], val_fraction, seed))
        sides: dict[str, dict[str, ImageInfo]] = {"train": {}, "val": {}}
        for row in whole:
            line = _line(row.value, taken)
            side = "val" if row.split == "train" and next(held) else row.split
            writer.add(side, line, row.where)
            sides.setdefault(side, {}).update({image: info for image in row.value.images if (info := taken[image][1])})
            if named is None and row.raw is not None:
                say(f"[dim]before[/]  {escape(_short(row.raw))}\n[dim]after [/]  {escape(_short(line))}")
        writer.not_used = [f"{key}: {counted(number, 'record')}" for key, number in data.unused.most_common()]
        shutil.rmtree(unpacked, ignore_errors=True)
    writer.summarize(out)
    if bare := sum(not row.value.images for row in whole):
        data.notes[f"of {counted(len(whole), 'example')} without an image"] = bare
    for note, number in data.notes.most_common():
        say(f"{number:>9,}  {escape(note)}")
    kinds = twins(list(sides["val"].values()), sides["train"].values())
    if alike := [image for image, kind in zip(sides["val"], kinds, strict=True) if kind]:
        what = f"{len(alike):,} images of val.jsonl (such as {alike[0]}) look nearly like one of train.jsonl"
        say(f"[yellow]warning[/]  {escape(what)}")


def _unpacked(archive: Path, folder: Path) -> Path:
    """The folder, with what a zip archive holds."""
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # the last two: encrypted
        raise InputError(f"{archive}: cannot be unpacked: {error}") from error
    return folder


def _take(
    files: Sequence[str], writer: DatasetWriter, root: Path, num_frames: int | None, looks: bool, progress: bool
) -> tuple[dict[str, Taken], dict[str, InputError]]:
    """By source file, the images that were written for it, or why there are none; `looks`: and what is in the first."""
    real_root, written = os.path.realpath(root), os.path.realpath(writer.images)

    def take(file: str) -> Taken | InputError:
        path = Path(file)
        linked = hashlib.sha256(os.fsencode(file)).hexdigest()[:24] + path.suffix
        name = os.path.relpath(file, real_root) if path.is_relative_to(real_root) else linked
        try:
            if num_frames is not None:
                names = writer.put_frames(name, path, num_frames)
            else:
                read_size(path)
                names = [path.name if path.is_relative_to(written) else writer.put_image(name, path)]
            return names, read_info(writer.images / names[0]) if looks else None
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


def _line(example: Example, taken: Mapping[str, Taken]) -> dict[str, Any]:
    """The line of an example, given the names of what was written for its images; without what is as usual."""
    usual = {"answers": (example.turns[-1].assistant,)}
    turns = []
    for turn in example.turns:
        images = [name for image in turn.images for name in taken[image][0]]
        answer = {} if turn.assistant is None else {"assistant": turn.assistant}
        turns.append({"images": images, "user": turn.user, **answer, **({} if turn.loss else {"loss": False})})
    line = {"id": example.id, "system": example.system, "conversations": turns, "answers": example.answers}
    return {key: value for key, value in line.items() if value and value != usual.get(key)}


def _short(record: object) -> str:
    text = json.dumps(record, ensure_ascii=False, default=lambda value: f"({type(value).__name__})")
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} [...]"
