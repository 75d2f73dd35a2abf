"""JSON in which questions or captions name their image by a number: VQAv2 and captions of COCO."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.layouts.source import Row, Rows, Source
from phi3v.data.tags import names_image


class Image(Struct):
    id: int
    file_name: str


class Pairs(Struct):
    """The file of VQAv2's questions, or of its annotations, or of COCO's captions."""

    images: list[Image] = []
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []


def rows(source: Source) -> Rows:
    """A record for every question, with the answer in a file of annotations beside it, or for every caption."""
    file = source.path
    pairs = jsonfile.convert(jsonfile.parse_object(file.read_bytes(), file), Pairs, str(file))
    answers: dict[str, dict[str, Any]] = {}
    for beside in sorted(file.parent.glob("*annotations*.json")) if pairs.questions else []:
        found = jsonfile.convert(jsonfile.parse_object(beside.read_bytes(), beside), Pairs, str(beside))
        answers |= {str(one.get("question_id")): one for one in found.annotations}
    numbered: dict[str, set[str]] = {}
    for path in source.root.rglob("*"):
        if names_image(path.name) and (digits := re.search(r"(\d+)\.\w+$", path.name)):
            numbered.setdefault(str(int(digits[1])), set()).add(str(path.relative_to(source.root)))
    numbered |= {str(image.id): {image.file_name} for image in pairs.images}
    for number, item in enumerate(pairs.questions or pairs.annotations, start=1):
        images = numbered.get(str(item.get("image_id")), set())
        wrong = InputError(f"{len(images)} images below {source.root} have the number {item.get('image_id')}")
        record = {**answers.get(str(item.get("question_id")), {}), **item, "image": min(images, default=None)}
        yield Row(f"{file}, item {number}", record if len(images) == 1 else wrong)
