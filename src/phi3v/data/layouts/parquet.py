"""Parquet and Arrow files of the Hub: columns of texts, conversations and images as bytes, read in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3v.base.errors import InputError
from phi3v.data.layouts.folders import split_of
from phi3v.data.layouts.source import Row, Rows, Source

ROWS_AT_ONCE = 16
"""Rows in memory; a row of document pages has a megabyte."""


def rows(source: Source) -> Rows:
    """The rows of a file, or of all in a folder, whose names say their split; classes by their names."""
    for file in source.files(".parquet", ".arrow"):
        split = split_of(file.stem) or split_of(file.parent.name) or "train"
        for number, row in enumerate(_rows(file), start=1):
            yield Row(f"{file}, row {number}", row, split)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with naming(file):
        if file.suffix == ".arrow":
            pyarrow = _pyarrow(file)
            reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            schema, batches = reader.schema, iter(reader)
        else:
            parquet = open_parquet_file(file)
            schema, batches = parquet.schema_arrow, parquet.iter_batches(batch_size=ROWS_AT_ONCE)
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        classes = {name: kind["names"] for name, kind in features.items() if isinstance(kind, dict) and "names" in kind}
        for batch in batches:
            for row in batch.to_pylist():
                known = {name: row[name] for name in classes if isinstance(row.get(name), int)}
                yield row | {name: classes[name][k] if k >= 0 else None for name, k in known.items()}  # -1: unknown


def open_parquet_file(file: Path) -> Any:
    """A parquet file of pyarrow. Raises InputError, naming the file."""
    parquet = _pyarrow(file).parquet
    with naming(file):
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)  # or it reads a whole row group ahead


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{file}: reading parquet needs pyarrow: pip install 'phi3v[hub]'") from error
    return pyarrow


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name the file in the error of its reader."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: damaged or not fully downloaded ({reason})") from error
