"""Images inside a page: each once, however many examples show it, and no more megabytes than were asked for."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from phi3v.base.errors import InputError
from phi3v.data.image import ImageRules, load_image

Entry = dict[str, Any]

QUALITY = 75
AT_ONCE = 32


class Album:
    """The images of a page, by number. `make` turns a path into the values that the page needs."""

    def __init__(self, make: Callable[[str], Entry], megabytes: float) -> None:
        self.make = make
        self.images: list[Entry | None] = []
        """None is an image for which `make` raised InputError."""
        self.numbers: dict[str, int] = {}
        self._bytes_left = megabytes * 1e6

    def add(self, paths: Iterable[str]) -> None:
        """Make one image after the other, until the page is full."""
        waiting = list(dict.fromkeys(paths))
        # Pillow releases Python's lock while it decodes and encodes.
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            for start in range(0, len(waiting), AT_ONCE):
                some = waiting[start : start + AT_ONCE]
                for path, made in zip(some, pool.map(self._make, some), strict=True):
                    self._bytes_left -= len(str(made))
                    if self._bytes_left < 0:
                        return
                    self.numbers[path] = len(self.images)
                    self.images.append(made)

    def __getitem__(self, paths: Sequence[str]) -> list[int]:
        """The numbers of the images of an example; -1 is an image for which the page has no room."""
        return [self.numbers.get(path, -1) for path in paths]

    def _make(self, path: str) -> Entry | None:
        try:
            return self.make(path)
        except InputError:
            return None


def thumbnail(path: str, pixels: int, rules: ImageRules) -> Entry:
    """The image in a file as the model sees it, shrunk to fit `pixels` x `pixels`. Raises as `load_image` does."""
    image = load_image(path, rules)
    width, height = image.size
    image.thumbnail((pixels, pixels))
    return {"src": data_uri(image), "width": width, "height": height}


def data_uri(image: Image.Image) -> str:
    """The image as WebP; a drawing of few colors without loss, which is smaller."""
    buffer = io.BytesIO()
    drawing = image.getcolors(256) is not None
    image.save(buffer, "WEBP", quality=QUALITY, lossless=drawing)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
