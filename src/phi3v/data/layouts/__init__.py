"""Other layouts of data, one file each: `LAYOUTS` is the table of them, `read` makes examples of what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from phi3v.base.errors import InputError
from phi3v.data.layouts import folders, json_records, table
from phi3v.data.layouts.record import TAG, line_of
from phi3v.data.layouts.source import Row, Rows, Source
from phi3v.data.schema import image_resolver, read_record

__all__ = ["FOLDERS", "LAYOUTS", "TAG", "Format", "Source", "read"]

Format = Literal["llava", "sharegpt", "messages", "csv", "imagefolder", "video-folder"]
FOLDERS = ("imagefolder", "video-folder")

LAYOUTS: dict[str, Callable[[Source], Rows]] = {
    "llava": json_records.rows,
    "sharegpt": json_records.rows,
    "messages": json_records.rows,
    "csv": table.rows,
    "imagefolder": folders.image_rows,
    "video-folder": folders.video_rows,
}


def read(format: Format, source: Source) -> Iterator[Row]:
    """Everything in a source, as a row whose value is an Example, or the InputError that says why it is none.

    Raises InputError if the source as a whole cannot be read.
    """
    resolve = image_resolver(source.path, source.root, source.others)
    try:
        for number, row in enumerate(LAYOUTS[format](source), start=1):
            try:
                if isinstance(row.value, InputError):
                    raise row.value
                line = {"id": f"{source.path.stem}-{number}", **line_of(row.value, source)}
                yield row._replace(value=read_record(line, row.where, resolve))
            except InputError as error:
                yield row._replace(value=error)
    except OSError as error:
        raise InputError(f"{error.filename or source.path}: {error.strerror}") from error
