"""Other layouts of data, one file each: `LAYOUTS` is the table of them, `recognize` tells which one a source has, and
`read` makes examples of what is in it.
"""

from __future__ import annotations

import mimetypes
import re
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from phi3v.base.errors import InputError
from phi3v.data.layouts import folders, json_records, label_studio, metadata, pairs, parquet, table, webdataset
from phi3v.data.layouts.record import line_of
from phi3v.data.layouts.source import Row, Rows, Source, files_in
from phi3v.data.schema import image_resolver, read_record


@dataclass(frozen=True)
class Layout:
    """How data of a layout is read, and by what it is recognized."""

    rows: Callable[[Source], Rows]
    keys: Set[str] = frozenset()
    """Keys of every record in JSON."""
    files: str = ""
    """A pattern of the names of its files."""

    def fits(self, record: Any) -> bool:
        """Whether a record of JSON has the keys."""
        return bool(self.keys) and isinstance(record, dict) and self.keys <= record.keys()


LAYOUTS: dict[str, Layout] = {
    "label-studio": Layout(label_studio.rows, {"data", "annotations"}),
    "vqa": Layout(pairs.rows, {"questions"}),
    "coco-captions": Layout(pairs.rows, {"images", "annotations"}),
    "swift": Layout(json_records.rows, {"query", "response"}),
    "roboflow": Layout(json_records.rows, {"prefix", "suffix"}),
    "llava": Layout(json_records.rows, {"image", "conversations"}),
    "sharegpt": Layout(json_records.rows, {"conversations"}),
    "messages": Layout(json_records.rows, {"messages"}),
    "questions": Layout(json_records.rows, {"question"}),
    "metadata": Layout(metadata.rows, files=r"metadata\.(jsonl|csv)"),
    "csv": Layout(table.rows, files=r".*\.[ct]sv"),
    "parquet": Layout(parquet.rows, files=r".*\.(parquet|arrow)"),
    "webdataset": Layout(webdataset.rows, files=r".*\.tar"),
    "imagefolder": Layout(partial(folders.rows, kind="image")),
    "video-folder": Layout(partial(folders.rows, kind="video")),
}

Format = Literal[tuple(LAYOUTS)]  # type: ignore[valid-type]
KINDS = {"imagefolder": "image", "video-folder": "video"}
NUM_SAMPLES = 100


def recognize(path: Path) -> tuple[str, Path, str]:
    """The layout of a file or folder, the file that has it, and why. Raises InputError if none is recognized."""
    files = files_in(path) if path.is_dir() else [path]
    for name, layout in LAYOUTS.items():
        if name != "csv" and (named := [file for file in files if re.fullmatch(layout.files, file.name)]):
            return name, path, f"it is, or holds, {named[0].name}"
    records = [file for file in files if file.suffix in (".json", ".jsonl", ".csv", ".tsv")]
    if len(records) == 1 and re.fullmatch(LAYOUTS["csv"].files, records[0].name):
        return "csv", records[0], f"it is, or holds, {records[0].name}"
    if len(records) == 1:
        samples = [value for _, value in islice(json_records.values(records[0]), NUM_SAMPLES)]
        counts = Counter({name: sum(map(layout.fits, samples)) for name, layout in LAYOUTS.items()})
        ((best, count),) = counts.most_common(1)  # the first of equals, which has most keys
        if count:
            keys = " and ".join(sorted(LAYOUTS[best].keys))
            return best, records[0], f"{count} of its first {len(samples)} records have {keys}"
    kinds = [(mimetypes.guess_type(file.name)[0] or "").partition("/")[0] for file in files]
    for name, kind in KINDS.items():
        if kind in kinds and not records:
            return name, path, f"{kinds.count(kind):,} of its {len(files):,} files are {kind}s"
    raise InputError(f"{path} has no layout that is recognized: name a file in it, or phi3v convert LAYOUT {path}")


def read(layout: str, source: Source, written: Path) -> Iterator[Row]:
    """Everything in a source, as a row whose value is an Example, or the InputError that says why it is none.

    Images may also lie in the folder `written`. Raises InputError if the source as a whole cannot be read.
    """
    resolve = image_resolver(source.path, source.root, [written, *source.reading.allow_links])
    try:
        for number, row in enumerate(LAYOUTS[layout].rows(source), start=1):
            try:
                if isinstance(row.value, InputError):
                    raise row.value
                line = {"id": f"{source.path.stem}-{number}", **line_of(row.value, source)}
                asked = "assistant" not in line["conversations"][-1]
                example = read_record(line, row.where, resolve, prompts=asked)
                yield Row(row.where, example, "questions" if asked else row.split, row.value)
            except InputError as error:
                yield row._replace(value=error)
    except OSError as error:
        raise InputError(f"{error.filename or source.path}: {error.strerror}") from error
