"""The forms in which data sets are published: parquet files of the Hub, JSON beside folders of images.

Whatever is missing, damaged or half downloaded raises an InputError that names the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import parse
from phi3v.data.layouts.parquet import ROWS_AT_ONCE, naming, open_parquet_file
from phi3v.data.schema import lines
from phi3v.recipes.conversion import Record, Rows, Source

CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = ("images", "texts")


def find_parquet(folder: Path, split: str, columns: Iterable[str], subset: str | None = None) -> list[Path]:
    """The parquet files of a split that have these columns, in order, at any depth of a folder.

    With `subset`, only those in a folder of that name, or directly in `folder`. Raises InputError, naming the file, if
    some of the split are missing or one is damaged.
    """
    found = [
        file
        for file in sorted(_files_below(folder))
        if file.suffix == ".parquet"
        and split in (file.name.partition("-")[0], file.parent.name)
        and (subset is None or subset in file.parts[len(folder.parts) - 1 :] or file.parent == folder)
        and {*columns} <= {*open_parquet_file(file).schema_arrow.names}
    ]
    if len(folders := {file.parent for file in found}) > 1:
        first, second, *_ = sorted(map(str, folders))
        raise InputError(f"the {split} split lies in both {first} and {second}: name one of them with --data-dir")
    numbers = [match for file in found if (match := re.search(r"-(\d{5})-of-(\d{5})", file.name))]
    there = {int(match[1]) for match in numbers}
    if numbers and (missing := sorted({*range(int(numbers[0][2]))} - there)):
        name = f"{split}-{missing[0]:05d}-of-{numbers[0][2]}*.parquet"
        raise InputError(
            f"{found[0].parent / name} is missing: {len(there)} of the {int(numbers[0][2])} files of the {split} split "
            "are there"
        )
    return found


def parquet_source(
    name: str,
    files: Sequence[Path],
    columns: Sequence[str],
    splits: Sequence[str],
    records: Callable[[int, str, dict[str, Any]], Iterable[Record]],
) -> Source:
    """Parquet files whose rows, (number, "file, row n", row), `records` turns into records."""
    return Source(name=name, files=files, splits=splits, rows=partial(open_parquet, files, columns), records=records)


def open_parquet(files: Sequence[Path], columns: Sequence[str]) -> Rows:
    """Number of rows, and (number, "file, row n", row) of each, read in batches. Raises InputError on damaged files."""

    def rows() -> Iterator[tuple[int, str, dict[str, Any]]]:
        number = 0
        for file in files:
            first = number
            with open_parquet_file(file) as parquet, naming(file):
                for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
                    for row in batch.to_pylist():
                        yield number, f"{file}, row {number - first}", row
                        number += 1

    return sum(open_parquet_file(file).metadata.num_rows for file in files), rows()


def image_bytes(value: Mapping[str, Any] | None, where: str) -> bytes:
    """The bytes of a cell of the Hub's type Image. Raises InputError if there are none."""
    content = (value or {}).get("bytes")
    if not content:
        raise InputError(f"{where}: there is no image in it")
    return content


def cauldron_source(
    files: Sequence[Path],
    subset: str,
    splits: Sequence[str],
    records: Callable[[int, str, list[bytes], list[dict[str, str]]], Iterable[Record]],
    *,
    num_images: int,
) -> Source:
    """A subset of the Cauldron whose rows, (number, "file, row n", images, texts), `records` turns into records.

    A text is {"user", "assistant", "source"}. A row of another subset raises InputError.
    """

    def of_row(number: int, where: str, row: dict[str, Any]) -> Iterable[Record]:
        images = [image_bytes(image, where) for image in row["images"]]
        sources = {re.sub(r"\W", "", text["source"]).lower() for text in row["texts"]}
        if len(images) != num_images or sources != {subset.replace("_", "")}:
            raise InputError(
                f"{where}: {len(images)} images from {', '.join(sorted(sources)) or 'nowhere'}, so this is not the "
                f"Cauldron's {subset} ({num_images} in every row)"
            )
        return records(number, where, images, row["texts"])

    return parquet_source(f"{CAULDRON}, {subset}", files, CAULDRON_COLUMNS, splits, of_row)


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of the named files that is in a folder or one level below."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
    return next((place / name for name in names for place in places if (place / name).is_file()), None)


def read_lines(file: Path, keys: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of a file with one JSON object a line. Raises InputError unless each has the keys."""
    for where, line in lines(file):
        try:
            row = parse(line)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        yield where, with_keys(row, keys, where)


def with_keys(row: Any, keys: Mapping[str, type], where: str) -> dict[str, Any]:
    """The row itself. Raises InputError unless it is an object with values of these types under the keys."""
    for key, kind in keys.items():
        if not isinstance(row, dict) or key not in row:
            raise InputError(f"{where}: there is no {key!r} in it")
        if not isinstance(row[key], kind):
            raise InputError(f"{where}: {key} is {row[key]!r}, which it cannot be")
    return row


def find_images(folder: Path, names: Iterable[str], file: Path) -> dict[str, Path]:
    """Files of these names, which `file` asks for, at any depth of a folder. Raises InputError if any is missing."""
    wanted = {*names}
    found = {path.name: path for path in _files_below(folder) if path.name in wanted}
    if missing := wanted - found.keys():
        raise InputError(
            f"{file}: {len(missing):,} of its {len(wanted):,} images are nowhere in {folder}, like {min(missing)}: "
            "download or unpack them"
        )
    return found


def nothing_found(folder: Path, task: str, expected: Iterable[str]) -> InputError:
    """The error for a folder that holds no form of a data set."""
    entries = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    found = f"{', '.join(entries[:5])}{more}" if entries else "nothing"
    return InputError(f"{folder} holds no {task}: expected {' or '.join(expected)}; found {found}")


def _files_below(folder: Path) -> Iterator[Path]:
    return (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
