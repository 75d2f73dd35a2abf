"""Write a data set: a jsonl file for every split and its images, whole or not at all.

What a line may hold is decided in `data.schema`: a line that could not be read back is not written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape

from phi3v.base.console import say
from phi3v.base.errors import InputError, one_line
from phi3v.base.files import written_whole
from phi3v.data.schema import image_resolver, read_record
from phi3v.data.video import sample_frames

NOT_CONVERTED, NOT_USED = "not_converted.txt", "not_used.txt"
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
"""Of image bytes, by how they begin; for the eye only, since images are read by their content."""

NUM_SHOWN = 5  # reasons on the terminal; the others are in the file


@contextmanager
def writing(target: Path, source: str) -> Iterator[DatasetWriter]:
    """A writer of the data set in the folder `target`, which appears at the end of the block.

    `source` is the `source` of every line. Raises InputError if `target` is not empty, or the disk is full.
    """
    with written_whole(target, new=True) as folder:
        writer = DatasetWriter(folder, source)
        yield writer
        for name, texts in writer.files.items():
            (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


class DatasetWriter:
    """Writes images and lines below `folder`. The methods for images may be called in forked processes."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder
        self.source = source
        self.lines: defaultdict[str, list[str]] = defaultdict(list)
        """By split."""
        self.left_out: list[str] = []
        """"where: why" of everything that is not in the data set."""
        self.not_used: list[str] = []
        """"key: number" of what no record was made of."""
        self.images = folder / "images"
        self._resolve = image_resolver(folder / "train.jsonl", None)

    @property
    def files(self) -> dict[str, list[str]]:
        """The text files, line by line, by name."""
        files = {f"{split}.jsonl": lines for split, lines in self.lines.items()}
        others = {NOT_CONVERTED: self.left_out, NOT_USED: self.not_used}
        return files | {name: texts for name, texts in others.items() if texts}

    def put_image(self, name: str, content: bytes | Path) -> str:
        """Write bytes as the image `name`, or give a file this second name, or copy it; return `name`."""
        file = self._place(name)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            try:
                os.link(content, file)
            except OSError:  # another file system, or the file of another user
                shutil.copyfile(content, file)
        return name

    def put_bytes(self, content: bytes) -> str:
        """Write bytes as an image named by what they are, and return its path."""
        name = self.put_image(hashlib.sha256(content).hexdigest()[:24] + suffix_of(content), content)
        return os.path.realpath(self.images / name)

    def put_frames(self, name: str, video: Path, num_frames: int) -> list[str]:
        """Write frames of a video as images `name`.0.jpg, `name`.1.jpg, ...; return their names."""
        names = [f"{name}.{k}.jpg" for k in range(num_frames)]
        for frame, frame_name in zip(sample_frames(video, num_frames), names, strict=True):
            frame.save(self._place(frame_name), format="JPEG")
        return names

    def add(self, split: str, record: Mapping[str, Any], where: str) -> None:
        """Add a line to {split}.jsonl. Raises InputError, naming `where`, for what a line may not hold."""
        line = {"id": record["id"], "source": self.source, **record}
        try:
            read_record(line, where, self._resolve, prompts=split == "questions")
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        self.lines[split].append(json.dumps(line, ensure_ascii=False))

    def leave_out(self, where: str, reason: object) -> None:
        """Note that something could not be converted."""
        self.left_out.append(one_line(f"{where}: {reason}"))

    def summarize(self, target: Path) -> None:
        """Print what was written to `target`, and what was left out."""
        for name, texts in self.files.items():
            say(f"{len(texts):>9,}  {escape(str(target / name))}")
        for what, texts in {"not converted": self.left_out, "not used": self.not_used}.items():
            for text in texts[:NUM_SHOWN]:
                say(f"[bold]{what}[/]  {escape(text)}")

    def _place(self, name: str) -> Path:
        file = self.images / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def suffix_of(content: bytes | Path) -> str:
    """The suffix of an image's name."""
    if isinstance(content, Path):
        return content.suffix
    return next((suffix for start, suffix in SUFFIXES.items() if content.startswith(start)), ".img")
