"""The Hub's ImageFolder: metadata.jsonl or metadata.csv beside the images that its `file_name` names."""

from __future__ import annotations

from dataclasses import replace

from phi3v.data.layouts import json_records, table
from phi3v.data.layouts.folders import split_of
from phi3v.data.layouts.source import Row, Rows, Source


def rows(source: Source) -> Rows:
    """The records of all such files in a folder."""
    for file in source.files(".jsonl", ".csv"):
        if file.stem != "metadata":
            continue
        read = table.rows if file.suffix == ".csv" else json_records.rows
        for where, value, *_ in read(replace(source, path=file)):
            if isinstance(value, dict) and isinstance(value.get("file_name"), str):
                value = value | {"file_name": str(file.parent.relative_to(source.path) / value["file_name"])}
            yield Row(where, value, split_of(file.parent.name) or "train")
