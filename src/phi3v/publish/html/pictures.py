"""Pictures inside a page: each once, however many examples show it, and no more megabytes than were asked for."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from phi3v.base.errors import InputError
from phi3v.data.image import load_image

Entry = dict[str, Any]

QUALITY = 75
AT_ONCE = 32


class Album:
    """The pictures of a page, by number. `make` turns a path into what the page needs of it, or raises InputError."""

    def __init__(self, make: Callable[[str], Entry], megabytes: float) -> None:
        self.make = make
        self.pictures: list[Entry | None] = []
        self.numbers: dict[str, int] = {}
        self._bytes_left = megabytes * 1e6

    def take(self, groups: Iterable[Sequence[str]]) -> None:
        """Makes the pictures of one example after the other, all or none of an example, until the page is full."""
        waiting = [list(group) for group in groups]
        # Pillow decodes and encodes without Python's lock.
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            for start in range(0, len(waiting), AT_ONCE):
                some = waiting[start : start + AT_ONCE]
                fresh = list(dict.fromkeys(path for group in some for path in group if path not in self.numbers))
                made = dict(zip(fresh, pool.map(self._make, fresh), strict=True))
                for group in some:
                    new = {path: made[path] for path in group if path not in self.numbers}
                    size = sum(len(str(picture)) for picture in new.values())
                    if size > self._bytes_left:
                        return
                    self._bytes_left -= size
                    for path, picture in new.items():
                        self.numbers[path] = len(self.pictures)
                        self.pictures.append(picture)

    def __getitem__(self, paths: Sequence[str]) -> list[int]:
        """The numbers of the pictures of an example; -1 for one that has no place in the page."""
        return [self.numbers.get(path, -1) for path in paths]

    def _make(self, path: str) -> Entry | None:
        try:
            return self.make(path)
        except InputError:
            return None


def thumbnail(path: str, pixels: int) -> Entry:
    """The picture in a file, made to fit `pixels` x `pixels`. Raises InputError as `load_image` does."""
    image = load_image(path)
    width, height = image.size
    image.thumbnail((pixels, pixels))
    return {"src": data_uri(image), "width": width, "height": height}


def data_uri(image: Image.Image) -> str:
    """The picture as WebP; a drawing of few colours without loss, which is smaller."""
    buffer = io.BytesIO()
    drawing = image.getcolors(256) is not None
    image.save(buffer, "WEBP", quality=QUALITY, lossless=drawing)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
