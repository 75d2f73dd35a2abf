"""A table with a header, as spreadsheets write it: the delimiter and the encoding are found out, and said."""

from __future__ import annotations

import csv
import io

from rich.markup import escape

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.data.layouts.source import Row, Rows, Source

DELIMITERS = (",", ";", "\t", "|")


def rows(source: Source) -> Rows:
    """The rows of a table, by the names of the columns."""
    file = source.path
    text, encoding = _text(source)
    header = text.partition("\n")[0]
    delimiter = source.delimiter or max(DELIMITERS, key=header.count)
    say(f"{escape(str(file))}: a table in {encoding}, separated by {delimiter!r} (--encoding, --delimiter)")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise InputError(f"{file}:1: two columns are named {twice!r}")
        for row in reader:
            given = sum(value is not None for name, value in row.items() if name is not None)
            extra = len(row.get(None, ()))
            few = InputError(f"{given + extra} cells, and the first line has {len(names)}: {', '.join(names)}")
            yield Row(f"{file}:{reader.line_num}", few if extra or given < len(names) else row)
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: {error}") from error


def _text(source: Source) -> tuple[str, str]:
    """The text of a file, and its encoding: that of its byte order mark, UTF-8 if it is valid, else that of Windows."""
    content = source.path.read_bytes()
    mark = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}.get(content[:2], "utf-8-sig")
    error: Exception = InputError("empty")
    for encoding in [source.encoding] if source.encoding else [mark, "cp1252"]:
        try:
            return content.decode(encoding), encoding
        except LookupError as unknown:
            raise InputError(f"--encoding {encoding}: there is none of that name") from unknown
        except UnicodeDecodeError as wrong:
            line = content.count(b"\n", 0, wrong.start) + 1
            error = InputError(f"{source.path}:{line}: not in {encoding}: name its --encoding")
    raise error
