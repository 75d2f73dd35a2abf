"""The HD transform: an image of any shape becomes 336x336 crops, bit for bit as in the published processor.

An image is scaled so that at most `num_crops` tiles cover it, and padded with white to whole tiles. The padded image,
uint8, is what data loading yields. Normalization and the global view (the whole image resized to one more crop) are
float operations on the tiles and run on any device. Sizes of padded images are (h, w) in pixels, both multiples of 336;
sizes of files are (width, height), as in Pillow.
"""

from __future__ import annotations

import math
import os
import stat
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

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


class ImageInfo(NamedTuple):
    """What an image file says besides its pixels."""

    size: tuple[int, int]
    """(width, height) in pixels."""

    rotated: bool
    """Whether its EXIF orientation tells viewers to turn or mirror it. The model sees it as it is stored."""

    animated: bool
    """Whether it has several frames or pages. The model sees the first."""


def read_size(path: str | Path) -> tuple[int, int]:
    """(width, height) from the header of an image file, without decoding it. Raises InputError as `load_image` does."""
    with _opened(path) as image:
        return image.size


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """The RGB image in a file, or of a Pillow image: alpha dropped, grey repeated, palette looked up, EXIF ignored.

    With several frames or pages it is the first. Raises InputError, naming the file, if it is missing, in none of
    FORMATS, unreadable, truncated or has more than MAX_PIXELS pixels.
    """
    with _opened(source) as image:
        return image.convert("RGB")


def read_info(path: str | Path) -> ImageInfo:
    """Decode an image file to see whether `load_image` can load it; raises InputError as that does."""
    with _opened(path) as image:
        size = image.convert("RGB").size
        try:
            # Only now: once decoded, a TIFF has been turned, and says so. The preview a telephone adds is no frame.
            rotated = image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
        except Exception:  # damaged metadata or a damaged second frame raises anything, and does not matter
            rotated = animated = False
        return ImageInfo(size, rotated, animated)


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
