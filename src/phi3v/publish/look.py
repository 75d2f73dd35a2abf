"""`phi3v look`: a data file as one HTML page before anything is trained on it: what the model will see of every image,
which tokens carry loss, and what is wrong, shown at its example.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.markup import escape

from phi3v.base.config import check_flags
from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, NonNegative, NonNegativeInt
from phi3v.data.check import CheckedLine, check, check_lines, counted
from phi3v.data.encode import Encoded, Example, encode
from phi3v.data.image import (
    CROP,
    colours,
    global_view,
    hd_padding,
    hd_transform,
    load_image,
    normalize,
    num_image_tokens,
    tiles_of,
)
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.statistics import Findings
from phi3v.publish.chart import Bars, bars, number
from phi3v.publish.html.images import Album, data_uri
from phi3v.publish.html.page import Gallery, cut, render, without_tags, write_page

MAX_LISTED = 200  # problems and warnings above the gallery


def look(
    data: Path,
    /,
    *,
    image_root: Path | None = None,
    model: str | None = None,
    num_crops: Count | None = None,
    out: Path | None = None,
    limit: Count = 300,
    picture_mb: NonNegative = 16.0,
    crop_size: Count = 168,
    num_workers: NonNegativeInt | None = None,
) -> int:
    """Show training data on a page as the model will see it: crops, tokens that carry loss, problems.

    The exit status is 2 if there are problems, as that of `phi3v check`.

    Args:
        data: Conversations, one JSON object a line.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        model: Show the tokens of this model's tokenizer, and cut images by its num_crops.
        num_crops: Tiles an image may be cut into. Default: the model's own, 4 without a model.
        out: The page. Default: DATA.html beside DATA.
        limit: Examples in the page, evenly spread, those with problems first.
        picture_mb: Megabytes of images in the page.
        crop_size: Pixels of a crop of 336 in the page.
        num_workers: Processes that read images. Default: one per core.
    """
    check_flags(locals(), look)
    target = out or data.with_suffix(".html")
    if target == data:
        raise InputError(f"{data}: its page would replace it: choose another --out")
    processor = Phi3VProcessor.from_pretrained(model, num_crops) if model else None
    crops = processor.num_crops if processor else num_crops or 4
    findings = check(data, image_root, processor, num_crops=crops, num_workers=num_workers)
    chosen = check_lines(data, image_root, processor, choose(findings, limit), num_crops=crops)
    shown = _gallery(chosen, findings.num_lines, processor, crops, picture_mb, crop_size)
    values = {
        "name": str(data),
        "findings": findings,
        "has_tokens": processor is not None,
        "num_crops": crops,
        "model": model,
        "statistics": _statistics(findings),
        "histograms": _histograms(findings),
        "max_listed": MAX_LISTED,
    }
    page = write_page(target, render("look.html.jinja", shown, **values))
    numbers = {"line": findings.num_lines, "problem": len(findings.problems), "warning": len(findings.warnings)}
    say(", ".join(counted(number, noun) for noun, number in numbers.items()))
    say(f"page    {escape(str(page))}")
    return 0 if findings.ok else 2


def _statistics(findings: Findings) -> list[tuple[str, list[str]]]:
    """Rows (name, [mean, median, 95 %, longest]) of numbers per example."""
    return [
        (name, [f"{one.mean:,.1f}", f"{one.p50:,}", f"{one.p95:,}", f"{one.max:,}"])
        for name, one in findings.statistics.items()
    ]


def _histograms(findings: Findings) -> list[Bars]:
    return [
        bars(f"{name.capitalize()} per example", one.histogram, noun="examples", note=f"mean {number(one.mean)}")
        for name, one in findings.statistics.items()
    ]


# -- gallery ---------------------------------------------------------------------------------------------------------


def _gallery(
    chosen: Sequence[CheckedLine],
    num_lines: int,
    processor: Phi3VProcessor | None,
    num_crops: int,
    picture_mb: float,
    crop_size: int,
) -> Gallery | None:
    if not chosen:
        return None
    album = Album(partial(_crops, num_crops=num_crops, pixels=crop_size), picture_mb)
    images = [list(line.example.images) if line.example else [] for line in chosen]
    album.add(images)
    vocabulary: dict[int, str] = {}
    entries = []
    for line, paths in zip(chosen, images, strict=True):
        entry = _entry(line, album[paths])
        if processor and line.example and line.measure:
            encoded = encode(line.example, processor)
            entry |= _tokens(encoded)
            for token in set(encoded.ids.tolist()) - vocabulary.keys():
                vocabulary[token] = _token_text(processor, token)
        entries.append(entry)
    bare = sum(-1 in entry["images"] for entry in entries)
    note = f"{'All' if len(chosen) == num_lines else f'{len(chosen):,} of'} {num_lines:,} lines"
    note += ". " if len(chosen) == num_lines else ", evenly spread, those with problems first (--limit shows more). "
    note += f"{bare:,} without images, which would take more than {picture_mb:g} MB (--picture-mb). " if bare else ""
    return Gallery(
        entries=entries,
        images=album.images,
        groups=[("", "All"), ("problem", "Problems"), ("warning", "Warnings"), ("fine", "Fine")],
        sorts=[
            ("Problems first", "rank", 1),
            ("As in the file", "order", 1),
            ("Most tokens first", "num_tokens", -1),
            ("Most crops first", "num_crops", -1),
            ("Longest answers first", "answer", -1),
            ("Shortest answers first", "answer", 1),
        ],
        vocabulary=vocabulary,
        note=note,
    )


def choose(findings: Findings, limit: int) -> set[int]:
    """At most `limit` lines: those with problems first, then those with warnings, then others, evenly spread."""
    bad = set(findings.bad_lines)
    odd = set(findings.odd_lines) - bad
    fine = [line for line in range(findings.num_lines) if line not in bad and line not in odd]
    chosen: set[int] = set()
    for some in (sorted(bad), sorted(odd), fine):
        room = min(limit - len(chosen), len(some))
        chosen.update(some[i * len(some) // room] for i in range(room))
    return chosen


def _rank(line: CheckedLine) -> int:
    return 0 if line.notes.problems else 1 if line.notes.warnings else 2


def _entry(line: CheckedLine, images: list[int]) -> dict[str, Any]:
    """An entry of the gallery; a line that holds no example is shown by its beginning."""
    example, measure, rank = line.example, line.measure, _rank(line)
    turns = example.turns if example else ()
    answer = (turns[0].assistant or "") if turns else ""
    answers = [("answer", cut(answer), "")] if example else []
    problems = [("", f"\N{BALLOT X} {cut(text)}", "bad") for text in line.notes.problems]
    warnings = [("", f"! {cut(text)}", "note") for text in line.notes.warnings]
    more = f" · {len(turns)} turns" if len(turns) > 1 else ""
    text = without_tags(turns[0].user) if turns else line.raw.decode("utf-8", "replace").strip()
    place = line.where.rpartition(":")[2]
    sizes = [f"{measure.tokens:,} tokens" if measure.tokens else "", f"{measure.crops:,} crops"] if measure else []
    return {
        "order": int(place),
        "group": ("problem", "warning", "fine")[rank],
        "rank": rank,
        "asked": cut(text),
        "rows": [*problems, *warnings, *answers],
        "foot": " · ".join([f":{place}", *filter(None, sizes)]) + more,
        "images": images,
        "turns": [(cut(turn.user), cut(turn.assistant or ""), len(turn.images)) for turn in turns]
        or [(cut(text), None, 0)],
        "details": _details(line, example),
        "num_tokens": measure.tokens if measure else 0,
        "num_crops": measure.crops if measure else 0,
        "answer": sum(len(turn.assistant or "") for turn in turns),
    }


def _details(line: CheckedLine, example: Example | None) -> list[tuple[str, str]]:
    measure = line.measure
    details = {"where": line.where}
    if example is not None:
        details |= {"id": example.id, "source": example.source, "group": example.group}
        details["images"] = "\n".join(example.images)
        answers = [turn.assistant for turn in example.turns[-1:]]
        details["accepted answers"] = " / ".join(example.answers) if list(example.answers) != answers else ""
    if measure is not None:
        details["crops"] = f"{measure.crops:,}"
        details["tokens"] = (
            f"{measure.tokens:,}, of them {measure.answer_tokens:,} carry loss" if measure.tokens else ""
        )
    return [(name, cut(text)) for name, text in details.items() if text]


# -- what the model sees ---------------------------------------------------------------------------------------------


def _crops(path: str, num_crops: int, pixels: int) -> dict[str, Any]:
    """The padded image with the grid it is cut along, and the global crop; a crop is `pixels` wide in the page."""
    image = load_image(path)
    hd = hd_transform(image, num_crops)
    h, w, _ = hd.shape
    tiles = normalize(tiles_of(hd))
    squeezed = colours(global_view(tiles, h, w)).permute(1, 2, 0).numpy()
    left, top, right, bottom = hd_padding(*image.size, num_crops)
    padding = f", {left + top + right + bottom} px of padding" if any((left, top, right, bottom)) else ""
    size = (pixels * w // CROP, pixels * h // CROP)
    return {
        "src": data_uri(_fit(Image.fromarray(hd), size)),
        "width": w,
        "height": h,
        "grid": [w // CROP, h // CROP],
        "padding": [left / w, top / h, right / w, bottom / h],
        "whole": data_uri(_fit(Image.fromarray(np.ascontiguousarray(squeezed)), (pixels, pixels))),
        "caption": f"{image.width}×{image.height} as {w}×{h}: {counted(w // CROP * (h // CROP), 'crop')}{padding}",
    }


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if size >= image.size else image.resize(size, Image.Resampling.LANCZOS)


def _tokens(encoded: Encoded) -> dict[str, Any]:
    """Ids, the ranges of them that carry loss, and the number of vectors that stand for every image."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.supervised, [False]]))).tolist()
    return {
        "tokens": encoded.ids.tolist(),
        "learnt": list(pairwise(edges))[::2],
        "image_tokens": [num_image_tokens(h, w) for h, w in encoded.image_sizes],
    }


def _token_text(processor: Phi3VProcessor, token: int) -> str:
    """The text of a token; a byte that is part of a character as <0xE4>."""
    piece = processor.tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"<{token}>"  # an id without a token, which a vocabulary may have
    return "\n" if piece == "<0x0A>" else str(piece).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
