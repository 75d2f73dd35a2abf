"""The HD transform: an image of any shape becomes 336x336 crops, bit for bit as in the published processor.

`ImageRules` say how a file becomes pixels. The published rules lose what does not fit into eight bits, and
transparency; `read_info` measures how much that is.

An image is scaled so that at most `num_crops` tiles cover it, and padded with white to whole tiles. The padded image,
uint8, is what data loading yields. Normalization and the global view (the whole image resized to one more crop) are
float operations on the tiles and run on any device. Sizes of padded images are (h, w) in pixels, both multiples of 336;
sizes of files are (width, height), as in Pillow.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import stat
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from phi3v.base.config import Colors, Orientation
from phi3v.base.errors import InputError

CROP = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, recognised by its content. Of the other forty formats of Pillow one starts a program (EPS)."""

MAX_PIXELS = 89_478_485
"""Most pixels of an image, Pillow's own threshold: a quarter of a GiB as RGB (A4 at 600 dpi has 35 M)."""

MAX_BYTES = 2**30
"""Size of the largest file that is read: some decoders begin by reading all of it."""

EXIF_ORIENTATION = 0x0112
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))
"""What makes an image upright, by its EXIF orientation."""

DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes with more than eight bits."""

VISIBLE = 16
"""A difference between two colors, of 255, that is seen."""


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """How an image file becomes the pixels that a model sees; a model keeps them in preprocessor_config.json."""

    exif_orientation: Orientation = "ignore"
    image_colors: Colors = "published"


PUBLISHED = ImageRules()


class ImageInfo(NamedTuple):
    """What is in an image file, whatever the rules."""

    size: tuple[int, int]
    """(width, height) in pixels as stored."""

    orientation: int
    """EXIF orientation if viewers turn or mirror the image, 2 to 8; otherwise 0."""

    animated: bool
    """Whether it has several frames or pages. The model sees the first."""

    clipped: float
    """Share of the pixels that the published rules lose because they are outside 0..255; 1 if no content is left."""

    transparent: float
    """Share of the pixels that look otherwise without transparency; 1 if no content is left."""

    digest: int
    """64 bits that stand for the bytes of the file."""

    look: bytes
    """LOOK bytes that barely change when the image is scaled or saved in another format."""

    def seen(self, rules: ImageRules) -> tuple[int, int]:
        """(width, height) of what `load_image` returns."""
        return _turned_size(self.size, self.orientation, rules)


LOOK = 4 * 4 + 3


def read_size(path: str | Path, rules: ImageRules = PUBLISHED) -> tuple[int, int]:
    """(width, height) of what `load_image` returns, from the header of a file. Raises InputError as that does."""
    with _opened(path) as image:
        if rules.exif_orientation == "ignore" or image.format == "TIFF":  # Pillow turns a TIFF itself, size and all
            return image.size
        return _turned_size(image.size, _orientation(image), rules)


def load_image(source: str | Path | Image.Image, rules: ImageRules = PUBLISHED) -> Image.Image:
    """The RGB image in a file, or of a Pillow image: grey repeated, palette looked up, otherwise as the rules say.

    With several frames or pages it is the first. Raises InputError, naming the file, if it is missing, in none of
    FORMATS, unreadable, truncated or has more than MAX_PIXELS pixels.
    """
    with _opened(source) as image:
        rgb = image.convert("RGB") if rules.image_colors == "published" else _visible(image)
        turn = TURNS.get(_orientation(image)) if rules.exif_orientation == "apply" else None
        return rgb if turn is None else rgb.transpose(turn)


def read_info(path: str | Path) -> ImageInfo:
    """Decode an image file to see whether `load_image` can load it; raises InputError as that does."""
    with _opened(path) as image:
        rgb = image.convert("RGB")
        try:
            # Only now: once decoded, a TIFF has been turned, and says so. The preview a telephone adds is no frame.
            orientation = _orientation(image)
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            clipped, transparent = _lost(image, rgb)
        except Exception:  # damaged metadata or a damaged second frame raises anything, and does not matter
            orientation, animated, clipped, transparent = 0, False, 0.0, 0.0
        small = rgb.resize((4, 4), Image.Resampling.BOX)
        look = small.convert("L").tobytes() + small.resize((1, 1), Image.Resampling.BOX).tobytes()
        return ImageInfo(rgb.size, orientation, animated, clipped, transparent, content_digest(path), look)


def content_digest(path: str | Path) -> int:
    """64 bits that stand for the bytes of a file."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, functools.partial(hashlib.blake2b, digest_size=8))
    return int.from_bytes(digest.digest(), "little")


def hd_size(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """(h, w) in pixels of a padded width x height image, which has h/336 * w/336 <= `num_crops` tiles.

    Raises InputError if the image is so elongated that its scaled short side vanishes.
    """
    h, w = _scaled(max(width, height), min(width, height), num_crops)
    h = math.ceil(h / CROP) * CROP
    return (w, h) if width < height else (h, w)


def num_tiles(h: int, w: int) -> int:
    """Number of local crops of a padded image of h x w pixels, without the global one."""
    return (h // CROP) * (w // CROP)


def num_image_tokens(h: int, w: int) -> int:
    """Number of positions in the sequence of a padded image of h x w pixels.

    Every crop gives 12x12 tokens; every row of the local grid (12 a of them) and of the global one (12) ends with a
    separator, and one separator stands between the two: (a b + 1) 144 + 12 (a + 1) + 1.
    """
    a, b = h // CROP, w // CROP
    return (a * b + 1) * 144 + 1 + (a + 1) * 12


def hd_transform(image: Image.Image, num_crops: int) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]: the RGB image scaled (antialiased bilinear) and padded with white, (h, w) = `hd_size`.

    A tall image is transposed, treated as a wide one and transposed back. Its bytes differ slightly from a direct
    resize, because Pillow's first pass then runs along the original's vertical axis.
    """
    width, height = image.size
    tall = width < height
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    h, w = _scaled(image.width, image.height, num_crops)
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.BILINEAR)
    padded = math.ceil(h / CROP) * CROP
    top = (padded - h) // 2
    hd = np.full((padded, w, 3), 255, dtype=np.uint8)
    hd[top : top + h] = np.asarray(image)
    return np.ascontiguousarray(hd.swapaxes(0, 1)) if tall else hd


def hd_padding(width: int, height: int, num_crops: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): the white pixels that `hd_transform` puts around a width x height image."""
    h, _ = _scaled(max(width, height), min(width, height), num_crops)
    padded = math.ceil(h / CROP) * CROP
    before = (padded - h) // 2
    after = padded - h - before
    return (before, 0, after, 0) if width < height else (0, before, 0, after)


def tiles_of(hd: NDArray[np.uint8]) -> Tensor:
    """uint8 [a*b, 3, 336, 336]: the local crops of an HD image [336a, 336b, 3], row by row."""
    h, w, _ = hd.shape
    tiles = hd.reshape(h // CROP, CROP, w // CROP, CROP, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(tiles).reshape(-1, 3, CROP, CROP))


def normalize(tiles: Tensor) -> Tensor:
    """float32, same shape [..., 3, H, W]: uint8 colors to (x/255 - mean) / std per channel."""
    mean = torch.tensor(MEAN, device=tiles.device)[:, None, None]
    std = torch.tensor(STD, device=tiles.device)[:, None, None]
    return tiles.to(torch.float32).div(255).sub_(mean).div_(std)


def global_view(tiles: Tensor, h: int, w: int) -> Tensor:
    """float32 [3, 336, 336]: the padded image of h x w pixels resized to one crop, from its normalized tiles.

    tiles: float32 [h/336 * w/336, 3, 336, 336]. Bicubic without antialiasing, and overshoot is kept, as published.
    """
    a, b = h // CROP, w // CROP
    image = tiles.reshape(a, b, 3, CROP, CROP).permute(2, 0, 3, 1, 4).reshape(1, 3, h, w)
    return F.interpolate(image, size=(CROP, CROP), mode="bicubic", align_corners=False)[0]


def colors(normalized: Tensor) -> Tensor:
    """uint8, same shape [..., 3, H, W]: the inverse of `normalize`, clamped to 0..255."""
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    return (normalized * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def pixel_values(hd: Sequence[NDArray[np.uint8]], num_crops: int) -> tuple[Tensor, Tensor]:
    """The published form of n HD images: global crop, local crops, then crops of zeros.

    Returns pixel_values float32 [n, num_crops+1, 3, 336, 336] and image_sizes int64 [n, 2], the (h, w) of each.
    """
    values = torch.zeros(len(hd), num_crops + 1, 3, CROP, CROP)
    sizes = torch.tensor([image.shape[:2] for image in hd], dtype=torch.int64).reshape(-1, 2)
    for slots, image in zip(values, hd, strict=True):
        tiles = normalize(tiles_of(image))
        slots[0] = global_view(tiles, *image.shape[:2])
        slots[1 : 1 + len(tiles)] = tiles
    return values, sizes


def _scaled(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """(h, w) of a wide image (width >= height) after scaling, before padding.

    The order of the float64 operations is the published one: w / (width / height) differs from w * height // width
    by a row for some sizes (24x17 with 4 crops).
    """
    ratio = width / height
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
        columns += 1
    w = columns * CROP
    h = int(w / ratio)
    if h == 0:
        raise InputError(f"image with sides {width} and {height} is too elongated for {num_crops} crops")
    return h, w


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is open; 0 if upright, and for damaged metadata, which raises anything."""
    with suppress(Exception):
        if (found := image.getexif().get(EXIF_ORIENTATION)) in TURNS:
            return int(found)
    return 0


def _turned_size(size: tuple[int, int], orientation: int, rules: ImageRules) -> tuple[int, int]:
    return size[::-1] if rules.exif_orientation == "apply" and orientation >= 5 else size


def _lost(image: Image.Image, rgb: Image.Image) -> tuple[float, float]:
    """(clipped, transparent) of an image, which the published rules turn into `rgb`."""
    if image.mode in DEEP:
        values = np.asarray(image)
        blank = values.min() < values.max() and (_is_blank(rgb) or values.max() <= 1)  # 0 and 1 of 255 look the same
        return (1.0 if blank else float(np.mean((values < 0) | (values > 255)))), 0.0
    if not image.has_transparency_data:
        return 0.0, 0.0
    if _is_blank(rgb) and not _is_blank(image.convert("RGBA").getchannel("A")):
        return 0.0, 1.0
    differences = np.asarray(ImageChops.difference(rgb, _laid_on(image, 255))).max(axis=2)
    return 0.0, float(np.mean(differences > VISIBLE))


def _visible(image: Image.Image) -> Image.Image:
    """The RGB image with what the published rules would lose; the same as theirs if that is nothing."""
    rgb = image.convert("RGB")
    clipped, transparent = _lost(image, rgb)
    if clipped:
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        values = values - values.min()
        return Image.fromarray((values * (255 / (values.max() or 1))).round().astype(np.uint8)).convert("RGB")
    if transparent:
        on_white = _laid_on(image, 255)
        return _laid_on(image, 0) if _is_blank(on_white) else on_white  # what is white itself needs black
    return rgb


def _laid_on(image: Image.Image, shade: int) -> Image.Image:
    """A transparent image on a background of one shade of grey."""
    background = Image.new("RGBA", image.size, (shade, shade, shade, 255))
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def _is_blank(image: Image.Image) -> bool:
    """Whether all pixels have the same color; `image` has eight bits a channel."""
    extrema: Any = image.getextrema()
    return all(low == high for low, high in (extrema if image.mode == "RGB" else [extrema]))


@contextmanager
def _opened(source: str | Path | Image.Image) -> Iterator[Image.Image]:
    """An image of acceptable size, not decoded yet. Whatever goes wrong in the block becomes an InputError."""
    name = "image" if isinstance(source, Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about odd metadata and large images
            with nullcontext(source) if isinstance(source, Image.Image) else _open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"{name}: {image.width}x{image.height} is more than {MAX_PIXELS} pixels")
                if not image.width * image.height:
                    raise InputError(f"{name}: unreadable image (no pixels)")
                yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such image{_similar(name)}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: absurdly large image ({error})") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: unreadable image (not {', '.join(FORMATS)}, or damaged)") from error
    except Exception as error:  # on damaged files Pillow's decoders raise anything
        raise InputError(f"{name}: unreadable image ({error or type(error).__name__})") from error


def _similar(name: str) -> str:
    """A hint at a file that has almost this name: in another Unicode form, letter case or system's notation."""
    stem, suffix = os.path.splitext(name)
    folder, base = os.path.split(name)
    others = [unquote(name), name.replace("\\", "/"), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    others += [
        stem + suffix.lower(),
        stem + suffix.upper(),
        *(os.path.join(folder, one) for one in (base.lower(), base.upper())),
    ]
    found = next((other for other in others if other != name and os.path.exists(other)), None)
    return f", but there is {found}" if found else ""


def _open(path: str | Path) -> Image.Image:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: unreadable image (not a file)")
    if status.st_size > MAX_BYTES:
        raise InputError(f"{path}: {status.st_size / 2**30:.1f} GiB is more than {MAX_BYTES / 2**30:.0f} GiB")
    return Image.open(path, formats=FORMATS)
