"""Exports of Label Studio (JSON): tasks with the choices and texts that annotators gave."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from msgspec import Struct

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.layouts import json_records
from phi3v.data.layouts.source import Row, Rows, Source

FIELDS = {"choices": "choices", "textarea": "text", "number": "number", "rating": "rating"}
SERVED = ("/data/local-files/?d=", "/data/upload/", "/data/")
"""Where Label Studio serves files: behind it stands the path below its folder, or below media/upload."""


class Result(Struct):
    type: str
    value: dict[str, Any]


class Annotation(Struct):
    result: list[Result]
    was_cancelled: bool = False


class Task(Struct):
    data: dict[str, Any]
    id: int | str = ""
    annotations: list[Annotation] = []


def rows(source: Source) -> Rows:
    """A record for every task: the fields of its data, and an answer of every annotator."""
    for where, value in json_records.values(source.path):
        try:
            yield Row(where, value if isinstance(value, InputError) else _record(jsonfile.convert(value, Task, "")))
        except InputError as error:
            yield Row(where, error)


def _record(task: Task) -> dict[str, Any]:
    answers = []
    for annotation in task.annotations:
        if other := next((result.type for result in annotation.result if result.type not in FIELDS), None):
            raise InputError(f"an annotation of type {other!r}: only {', '.join(FIELDS)} are converted")
        found = [result.value.get(FIELDS[result.type]) for result in annotation.result]
        texts = [str(text) for value in found for text in (value if isinstance(value, list) else [value])]
        answers += [", ".join(texts)] if texts and not annotation.was_cancelled else []
    served = {
        key: next((unquote(value.removeprefix(start)) for start in SERVED if value.startswith(start)), value)
        for key, value in task.data.items()
        if isinstance(value, str)
    }
    return {"id": task.id, "answers": answers, **task.data, **served}
