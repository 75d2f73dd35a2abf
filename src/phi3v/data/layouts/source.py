"""What is converted, how it is read, and an account of what was not used."""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from phi3v.base.errors import InputError
from phi3v.data.tags import is_image_key, names_image


class Row(NamedTuple):
    """A record of the data as a dictionary, or the InputError that it cannot be read."""

    where: str
    value: Any
    split: str = "train"


Rows = Iterator[Row]

EMPTY: Sequence[Any] = (None, "", b"", [], {}, (), "[]", "{}")

MEANING = re.compile(
    r"tools?|functions?|(function|tool)_calls?|objects?|b?box(es)?|rejected.*|chosen.*|videos?|audios?|history|input"
    r"|choices|options|context|passage|hint"
)
"""Keys that change what a conversation says. What they hold cannot be dropped like a license or a score."""

BAD_IF_FALSE = ("kto_tag", "label", "desirable")
ASKED = "the question is"
MAX_PATH = 1024


@dataclass(kw_only=True)
class Source:
    """What is converted. `path` is the file or folder, and image paths are relative to `root`."""

    path: Path
    root: Path
    put: Callable[[bytes], str]
    """Writes the bytes of an image and returns its absolute path."""
    others: Sequence[Path] = ()
    """Folders besides `root` that images may lie in."""
    question: str | None = None
    """Asked about what has no question of its own."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name of a key of theirs."""
    ignore: Sequence[str] = ()
    """Keys that may be dropped, whatever they mean."""
    delimiter: str | None = None
    encoding: str | None = None
    """Of a table; None: what its first line has most of, and what it can be read in."""
    unused: Counter[str] = field(default_factory=Counter)
    """Keys that nothing was made of, with the number of records that have them."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was guessed, with the number of records."""

    def image(self, value: Any) -> str:
        """The path of an image that is given as a path, an object with one, bytes, or a data URL. Raises InputError."""
        if isinstance(value, dict):
            names = [name for name in ("bytes", "url", "path", "image_url", "image", "src") if value.get(name)]
            if not names:
                raise InputError(f"an image with the keys {', '.join(map(repr, value))}, none of which is known")
            value = value[names[0]]
            if names[0] == "bytes" and isinstance(value, str):
                value = _decoded(value)
        if isinstance(value, dict):
            return self.image(value)
        if isinstance(value, str) and value.startswith("data:"):
            value = _decoded(value.partition(",")[2])
        if isinstance(value, bytes):
            return self.put(value)
        if not isinstance(value, str):
            raise InputError("an image is neither a path nor bytes")
        if len(value) > MAX_PATH:
            raise InputError(f"{value[:30]!r}... is no path. If it is base64, begin it with data:image/jpeg;base64,")
        if re.match(r"https?://", value):
            raise InputError(f"{value}: images are not downloaded: download them and name the files instead")
        return value.removeprefix("file://")

    def ask(self, default: str | None) -> str:
        """The question about what has none of its own. Raises InputError if there is none."""
        if (question := self.question or default) is None:
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
            if key not in self.ignore and (reason := _why_it_matters(key, value, shown)):
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


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise InputError(f"an image in base64 that is damaged: {error}") from error


def take(left: dict[str, Any], *names: str) -> Any:
    """Remove and return the first of these keys that is there, in whatever case; None if there is none."""
    for name in names:
        for key in left:
            if key.lower() == name:
                return left.pop(key)
    return None
