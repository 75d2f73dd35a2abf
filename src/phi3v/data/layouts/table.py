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
    delimiter = source.reading.delimiter or max(DELIMITERS, key=header.count)
    say(f"{escape(str(file))}: a table in {encoding}, separated by {delimiter!r} (--encoding, --delimiter)")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise InputError(f"{file}:1: two columns are named {twice!r}")
        for row in reader:
            cells = sum(value is not None for value in row.values()) + max(0, len(row.get(None, ())) - 1)
            wrong = InputError(f"{cells} cells, and the first line has {len(names)}: {', '.join(names)}")
            yield Row(f"{file}:{reader.line_num}", row if cells == len(names) else wrong)
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: {error}") from error


def _text(source: Source) -> tuple[str, str]:
    """The text of a file, and its encoding: that of its byte order mark, UTF-8 if it is valid, else that of Windows."""
    content, given = source.path.read_bytes(), source.reading.encoding
    marked = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    for encoding in [given] if given else [marked, "cp1252"]:
        try:
            return content.decode(encoding), encoding
        except (LookupError, UnicodeDecodeError) as error:
            line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
    raise InputError(f"{source.path}:{line}: not in {encoding}: name its --encoding")
