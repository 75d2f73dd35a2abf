"""A page of results as one HTML file that needs no network and no other file.

The templates hold what there is once. Examples with their images, of which there may be thousands, are a gallery: a
block of JSON that page.js shows page by page. Text of a model or of the data is escaped by the template or set through
`textContent`; the page's content security policy allows this one script, images within the page, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from phi3v.base.errors import InputError
from phi3v.base.files import write_text
from phi3v.data.processor import IMAGE_TAG
from phi3v.publish.chart import HEIGHT, WIDTH, number, percent

FOLDER = Path(__file__).parent

MAX_TEXT = 10_000
"""Characters of one text in a gallery."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What page.js shows. Each entry is a JSON object with these keys, of which some may be missing:

    order, group      its place in the file; the filter it belongs to
    asked, rows       the question, and below it [label or "", text, tone] lines; tone is "", "good", "bad", "note"
    foot              small print
    images            numbers of images, in the order of the conversation
    turns             [user, assistant or null, number of images] of the whole conversation
    details           [label, text] pairs that are shown with the conversation
    run, key, cell    number of its run; the same in all runs for one question; [truth, answer] of the confusion matrix
    tokens, learnt    ids and the ranges [start, end) of them that carry loss; `vocabulary` has their texts
    image_tokens      for every image id among the tokens, how many vectors stand there
    others            numbers to sort by
    """

    entries: Sequence[Mapping[str, Any]]
    images: Sequence[Mapping[str, Any] | None]
    """{"src", "width", "height"} and, if they are cut into crops, more: `publish.look`. None: could not be read."""
    groups: Sequence[tuple[str, str]]
    """(group, label) of the filters, "" for everything."""
    sorts: Sequence[tuple[str, str, int]]
    """(label, number of an entry to sort by, 1 or -1 for descending); equal ones stay in the order of the file."""
    runs: Sequence[str] = ()
    vocabulary: Mapping[int, str] | None = None
    note: str = ""
    """How much of the data is shown, and the flags for more."""


def render(template: str, gallery: Gallery | None, **values: Any) -> str:
    """The page; `values` are the template's own."""
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment(FOLDER, autoescape=True)
        .get_template(template)
        .render(
            style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_digest=digest,
            gallery=gallery,
            gallery_json=_embedded(gallery) if gallery else "",
            width=WIDTH,
            height=HEIGHT,
            **values,
        )
    )


def environment(folder: Path, *, autoescape: bool) -> jinja2.Environment:
    """The templates in a folder; a value that is missing is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"percent": percent, "number": number}
    return made


def write_page(path: Path, page: str) -> Path:
    """Write the page whole or not at all. Raises InputError for another name than *.html, which may be a data file."""
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"--out {path}: the name of a page ends in .html")
    write_text(path, page)
    return path


def without_tags(text: str) -> str:
    """The text without the image tags in front of it; unchanged if there are others within it."""
    rest = re.sub(rf"^(?:{IMAGE_TAG.pattern}\s*)+", "", text)
    return text if IMAGE_TAG.search(rest) else rest


def cut(text: str) -> str:
    """A text of at most MAX_TEXT characters, with a note of how many were cut off."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT:,} more characters]"


def gallery_in(page: Path) -> dict[str, Any]:
    """What the gallery of a page that was written before holds, by the fields of `Gallery`; {} without one."""
    with suppress(OSError, msgspec.MsgspecError):
        _, _, rest = page.read_text(encoding="utf-8").partition('id="gallery">')
        return msgspec.json.decode(rest.partition("</script>")[0], type=dict[str, Any])
    return {}


def _embedded(gallery: Gallery) -> Markup:
    """JSON that a script element can hold: without "<", which would end it; NaN becomes null."""
    return Markup(msgspec.json.encode(gallery).decode().replace("<", "\\u003c"))
