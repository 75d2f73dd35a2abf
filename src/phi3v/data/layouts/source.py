"""What is converted, how it is read, and an account of what was not used."""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import posixpath
import re
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import filterfalse
from pathlib import Path
from typing import Any, NamedTuple

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.tags import is_image_key, names_image


class Row(NamedTuple):
    """A record of the data as a dictionary, or the InputError that it cannot be read."""

    where: str
    value: Any
    split: str = "train"
    raw: Any = None
    """The record, where `value` is an example."""


Rows = Iterator[Row]

EMPTY: Sequence[Any] = (None, "", b"", [], {}, (), "[]", "{}")

MEANING = re.compile(
    r"tools?|functions?|(function|tool)_calls?|objects?|b?box(es)?|rejected.*|chosen.*|videos?|audios?|history|input"
    r"|choices|options|context|passage|hint|closed_turns"
)
"""Keys that change what a conversation says. What they hold cannot be dropped like a license or a score."""

BAD_IF_FALSE = ("kto_tag", "label", "desirable")
IMAGE_FIELDS = ("bytes", "url", "path", "image_url", "image", "src")
ASKED = "the question is"
NOT_DATA = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")
MAX_PATH = 1024


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read."""

    question: str | None = None
    """The question about what has none. Default: for class folders to classify, naming all classes; for captions to
    describe."""

    columns: str = ""
    """Which keys or columns are which, where they have other names: image=photo,question=q,answer=a."""

    ignore: str = ""
    """Keys or columns that may be dropped although they change what a record says, separated by commas."""

    unanswered: bool = False
    """Keep questions without answers, in questions.jsonl for `phi3v predict`."""

    download: bool = False
    """Fetch images that are web addresses."""

    allow_links: tuple[Path, ...] = ()
    """Folders outside the image root that images may lie in, or be links to."""

    delimiter: str | None = None
    """What separates the cells of a table. Default: what its first line has most of."""

    encoding: str | None = None
    """Encoding of a table. Default: UTF-8 or UTF-16, else that of Windows (cp1252)."""


@dataclass
class Source:
    """What is converted. `path` is the file or folder, and image paths are relative to `root`."""

    path: Path
    root: Path
    put: Callable[[bytes], str]
    """Writes the bytes of an image and returns its absolute path."""
    reading: Reading = Reading()
    unused: Counter[str] = field(default_factory=Counter)
    """Keys that nothing was made of, with the number of records that have them."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was guessed, with the number of records."""
    columns: dict[str, str] = field(init=False)
    """Our names of their keys."""

    def __post_init__(self) -> None:
        pairs = [pair.partition("=") for pair in self.reading.columns.split(",") if pair]
        if wrong := next(("".join(pair) for pair in pairs if not all(pair)), None):
            raise InputError(f"--columns {wrong}: it must be as in image=photo,question=q,answer=a")
        self.columns = {theirs: ours for ours, _, theirs in pairs}

    def files(self, *suffixes: str) -> list[Path]:
        """The file that is converted, or those of a folder with these suffixes."""
        return [self.path] if self.path.is_file() else [file for file in files_in(self.path) if file.suffix in suffixes]

    def image(self, value: Any) -> str:
        """The path of an image that is given as a path, an object with one, bytes, or a data URL. Raises InputError."""
        if isinstance(value, dict):
            name = next((name for name in IMAGE_FIELDS if value.get(name)), None)
            if name is None:
                raise InputError(f"an image with the keys {', '.join(map(repr, value))}, none of which is known")
            inline = name == "bytes" and isinstance(value[name], str)
            return self.image(f"data:,{value[name]}" if inline else value[name])
        if isinstance(value, str) and value.startswith("data:"):
            try:
                value = base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise InputError(f"an image in base64 that is damaged: {error}") from error
        if isinstance(value, bytes):
            return self.put(value)
        if len(of_kind(value, str, "an image")) > MAX_PATH:
            raise InputError(f"{value[:30]!r}... is no path. If it is base64, begin it with data:image/jpeg;base64,")
        if re.match(r"https?://", value):
            if not self.reading.download:
                raise InputError(f"{value}: a web address (--download fetches it)")
            return self.put(_downloaded(value))
        return value.removeprefix("file://")

    def ask(self, default: str | None) -> str:
        """The question about what has none of its own. Raises InputError if there is none."""
        if (question := self.reading.question or default) is None:
            raise InputError("conversations, messages or question is missing (--columns, --question)")
        self.notes[f"{ASKED} {question!r} (--question)"] += 1
        return question

    def account(self, left: Mapping[str, Any], place: str = "", shown: Sequence[Any] = ()) -> None:
        """Count the keys of a record that nothing was made of. Raises InputError for one that changes its meaning.

        `shown` are the images of the record.
        """
        for key, value in left.items():
            if value in EMPTY:
                continue
            if key not in self.reading.ignore.split(",") and (reason := _why_it_matters(key, value, shown)):
                raise InputError(f"{place}{key} {reason} (--ignore {key} drops it)")
            self.unused[place + key] += 1


def _why_it_matters(key: str, value: Any, shown: Sequence[Any]) -> str | None:
    if MEANING.fullmatch(key.lower()):
        return "cannot be converted"
    if key.lower() in BAD_IF_FALSE and value is False:
        return "is false: the answer is a bad example"
    paths = [posixpath.basename(image) for image in shown if isinstance(image, str)]
    if is_image_key(key) and shown and len(paths) == len(shown):
        return None if posixpath.basename(str(value)) in paths else "holds another image"
    if not shown and names_image(value):
        return "holds an image: name it with --columns image=" + key
    return None


def _downloaded(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{address}: cannot be downloaded: {error}") from error


def files_in(folder: Path) -> list[Path]:
    """The files in a folder that may be data, at any depth, links followed, in the order of their names."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = filterfalse(is_other, folders)
        found += (Path(place, name) for name in filterfalse(is_other, names))
    return sorted(found)


def is_other(name: str) -> bool:
    """Whether a file or folder is a hidden one, or an operating system's."""
    return name.startswith(".") or name in NOT_DATA


def take(left: dict[str, Any], *names: str) -> Any:
    """Remove and return the first of these keys that is there, in whatever case; None if there is none."""
    for name in names:
        for key in left:
            if key.lower() == name:
                return left.pop(key)
    return None


def of_kind(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    """The value. Raises InputError if it is of another kind."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{name} cannot be {jsonfile.KINDS.get(type(value), 'a number')}")
    return value
