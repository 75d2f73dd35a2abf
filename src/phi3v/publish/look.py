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

from phi3v.base.config import Colors, Orientation, check_flags
from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, NonNegative, NonNegativeInt
from phi3v.data.check import CheckedLine, check, check_lines, counted
from phi3v.data.encode import Encoded, encode
from phi3v.data.image import (
    CROP,
    ImageRules,
    colors,
    global_view,
    hd_padding,
    hd_transform,
    load_image,
    normalize,
    num_image_tokens,
    tiles_of,
)
from phi3v.data.processor import Phi3VProcessor, seeing
from phi3v.data.statistics import Findings
from phi3v.infer.answering import evenly
from phi3v.publish.chart import bars, number
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
    exif_orientation: Orientation | None = None,
    image_colors: Colors | None = None,
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
        exif_orientation: Turn images as `phi3v train --exif-orientation` does. Default: the model's own, or ignore.
        image_colors: Read colors as `phi3v train --image-colors` does. Default: the model's own, or published.
        out: The page. Default: the data file's name with .html, beside it.
        limit: Examples in the page, evenly spread, those with problems first.
        picture_mb: Megabytes of images in the page.
        crop_size: Pixels of a crop of 336 in the page.
        num_workers: Processes that read images. Default: one per core.
    """
    check_flags(locals(), look)
    target = out or data.with_suffix(".html")
    if target == data:
        raise InputError(f"{data}: its page would replace it: choose another --out")
    processor, crops, rules = seeing(model, num_crops, exif_orientation, image_colors)
    findings = check(data, image_root, processor, num_crops=crops, rules=rules, num_workers=num_workers)
    chosen = check_lines(data, image_root, processor, choose(findings, limit), num_crops=crops, rules=rules)
    album = Album(partial(_crops, num_crops=crops, rules=rules, pixels=crop_size), picture_mb)
    shown = _gallery(chosen, findings.num_lines, processor, album, picture_mb)
    histograms = [
        bars(f"{name.capitalize()} per example", one.histogram, noun="examples", note=f"mean {number(one.mean)}")
        for name, one in findings.statistics.items()
    ]
    values = {"name": str(data), "findings": findings, "histograms": histograms, "model": model, "num_crops": crops}
    page = write_page(target, render("look.html.jinja", shown, max_listed=MAX_LISTED, **values))
    problems, warnings = counted(len(findings.problems), "problem"), counted(len(findings.warnings), "warning")
    say(f"{counted(findings.num_lines, 'line')}, {problems}, {warnings}")
    say(f"page    {escape(str(page))}")
    return 0 if findings.ok else 2


# -- gallery ---------------------------------------------------------------------------------------------------------


def _gallery(
    chosen: Sequence[CheckedLine],
    num_lines: int,
    processor: Phi3VProcessor | None,
    album: Album,
    picture_mb: float,
) -> Gallery | None:
    if not chosen:
        return None
    images = [list(line.example.images) if line.example else [] for line in chosen]
    album.add(path for paths in images for path in paths)
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
    note = f"All {num_lines:,} lines. "
    if len(chosen) < num_lines:
        note = f"{len(chosen):,} of {num_lines:,} lines, evenly spread, problems first (--limit shows more). "
    note += f"{bare:,} lack images, which would take more than {picture_mb:g} MB (--picture-mb). " if bare else ""
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
        chosen.update(evenly(some, limit - len(chosen)))
    return chosen


def _entry(line: CheckedLine, images: list[int]) -> dict[str, Any]:
    """An entry of the gallery; a line that holds no example is shown by its beginning."""
    example, measure, notes = line.example, line.measure, line.notes
    warnings = [*notes.warnings, *line.about_images]
    rank = 0 if notes.problems else 1 if warnings else 2
    place = line.where.rpartition(":")[2]
    rows = [("", f"\N{BALLOT X} {cut(text)}", "bad") for text in notes.problems]
    rows += [("", f"! {cut(text)}", "note") for text in warnings]
    turns: list[tuple[str, str | None, int]] = [(line.raw.decode("utf-8", "replace").strip(), None, 0)]
    details = {"where": line.where}
    foot = [f":{place}"]
    if example:
        turns = [(turn.user, turn.assistant or "", len(turn.images)) for turn in example.turns]
        rows.append(("answer", cut(example.turns[0].assistant or ""), ""))
        details |= {"id": example.id, "source": example.source, "system": example.system, "group": example.group}
        details["images"] = "\n".join(example.images)
        if len(example.answers) > 1:
            details["accepted answers"] = " / ".join(example.answers)
    if measure:
        foot += [f"{measure.tokens:,} tokens"] if measure.tokens else []
        foot.append(f"{measure.crops:,} crops")
        details["crops"] = f"{measure.crops:,}"
        if measure.tokens:
            details["tokens"] = f"{measure.tokens:,}, of them {measure.answer_tokens:,} carry loss"
    return {
        "order": int(place),
        "group": ("problem", "warning", "fine")[rank],
        "rank": rank,
        "asked": cut(without_tags(turns[0][0])),
        "rows": rows,
        "foot": " · ".join(foot + ([f"{len(turns)} turns"] if len(turns) > 1 else [])),
        "images": images,
        "turns": [(cut(user), None if answer is None else cut(answer), count) for user, answer, count in turns],
        "details": [(name, cut(text)) for name, text in details.items() if text],
        "num_tokens": measure.tokens if measure else 0,
        "num_crops": measure.crops if measure else 0,
        "answer": sum(len(answer or "") for _, answer, _ in turns),
    }


# -- what the model sees ---------------------------------------------------------------------------------------------


def _crops(path: str, num_crops: int, rules: ImageRules, pixels: int) -> dict[str, Any]:
    """The padded image with the grid it is cut along, and the global crop; a crop is `pixels` wide in the page."""
    image = load_image(path, rules)
    hd = hd_transform(image, num_crops)
    h, w, _ = hd.shape
    squeezed = colors(global_view(normalize(tiles_of(hd)), h, w)).permute(1, 2, 0).numpy()
    padded, whole = Image.fromarray(hd), Image.fromarray(np.ascontiguousarray(squeezed))
    padded.thumbnail((pixels * w // CROP, pixels * h // CROP))
    whole.thumbnail((pixels, pixels))
    left, top, right, bottom = hd_padding(*image.size, num_crops)
    padding = f", {left + top + right + bottom} px of padding" if any((left, top, right, bottom)) else ""
    return {
        "src": data_uri(padded),
        "width": w,
        "height": h,
        "grid": [w // CROP, h // CROP],
        "padding": [left / w, top / h, right / w, bottom / h],
        "whole": data_uri(whole),
        "caption": f"{image.width}×{image.height} as {w}×{h}: {counted(w // CROP * (h // CROP), 'crop')}{padding}",
    }


def _tokens(encoded: Encoded) -> dict[str, Any]:
    """Ids, the ranges of them that carry loss, and the number of vectors that stand for every image."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.loss_mask, [False]]))).tolist()
    return {
        "tokens": encoded.ids.tolist(),
        "learnt": list(pairwise(edges))[::2],
        "image_tokens": [num_image_tokens(h, w) for h, w in encoded.image_sizes],
    }


def _token_text(processor: Phi3VProcessor, token: int) -> str:
    """The text of a token; a byte that is part of a character as <0xE4>."""
    piece = processor.tokenizer.convert_ids_to_tokens(token)
    return "\n" if piece == "<0x0A>" else str(piece).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
