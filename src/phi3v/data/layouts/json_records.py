"""JSON: an array of records, one record a line, or an object with all records in one of its fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.layouts.source import Row, Rows, Source
from phi3v.data.schema import lines

WRAPPERS = ("data", "rows", "records", "items", "examples")
"""Fields with all records."""


def rows(source: Source) -> Rows:
    """The records of a file."""
    return (Row(where, value) for where, value in values(source.path))


def values(file: Path) -> Iterator[tuple[str, Any]]:
    """("file, item n", record) of an array, ("file:line", record) of a file with one a line."""
    content = file.read_bytes()
    found = _parsed(content)
    if isinstance(found, dict):
        found = next((inside for name in WRAPPERS if isinstance(inside := found.get(name), list)), [found])
    if isinstance(found, list):
        yield from ((f"{file}, item {number}", value) for number, value in enumerate(found, start=1))
    elif content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise InputError(f"{file}: {found}")
    else:
        yield from ((where, _parsed(line)) for where, line in lines(file))


def _parsed(content: bytes) -> Any:
    """The value of a JSON text, or the InputError that it is none."""
    try:
        return jsonfile.parse(content)
    except InputError as error:
        return error
