from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from phi3v.base.errors import InputError
from phi3v.data.image import (
    CROP,
    EXIF_ORIENTATION,
    LOOK,
    ImageInfo,
    ImageRules,
    colors,
    global_view,
    hd_padding,
    hd_size,
    hd_transform,
    load_image,
    normalize,
    num_image_tokens,
    num_tiles,
    pixel_values,
    read_info,
    read_size,
    tiles_of,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "processor" / "cases.json").read_text())["cases"]


def sha256(array: np.ndarray | torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(array)).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def samples() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "processor" / "samples.safetensors")


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if "error" not in case])
def test_golden(key: str, samples: dict[str, torch.Tensor]) -> None:
    case = CASES[key]
    path = GOLDEN / "images" / f"{case['image']}.png"
    size = (h, w) = tuple(case["image_sizes_hw"])
    assert read_size(path) == tuple(case["size_wh"])
    assert hd_size(*read_size(path), case["num_crops"]) == size
    assert num_image_tokens(h, w) == case["num_img_tokens"]
    assert num_tiles(h, w) == case["real_crops"]

    hd = hd_transform(load_image(path), case["num_crops"])
    assert hd.dtype == np.uint8
    assert hd.shape == (h, w, 3)
    assert sha256(hd) == case["sha256_hd_uint8"]

    values, sizes = pixel_values([hd], case["num_crops"])
    assert list(values[0].shape) == case["pixel_values_shape"]
    assert sizes.tolist() == [[h, w]]
    tiles = values[0, 1 : 1 + num_tiles(h, w)]
    assert sha256(tiles) == case["sha256_local"]
    assert not values[0, 1 + num_tiles(h, w) :].any()
    # The scalar torch kernel gives other bits than AVX2 and AVX512 do, hence no SHA-256 of the global view.
    torch.testing.assert_close(values[0, 0, :, 1::16, 2::16], samples[f"{key}/global"], atol=2e-6, rtol=0)
    assert torch.equal(tiles[:, :, 3::37, 5::41], samples[f"{key}/local"])


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if "error" in case])
def test_too_elongated(key: str) -> None:
    case = CASES[key]
    image = load_image(GOLDEN / "images" / f"{key.split('/')[0]}.png")
    num_crops = int(key.split("/nc")[1])
    with pytest.raises(InputError, match="too elongated"):
        hd_transform(image, num_crops)
    with pytest.raises(InputError, match="too elongated"):
        hd_size(*image.size, num_crops)
    assert case["error"].startswith("ValueError")


def test_what_is_padded_is_padded_no_further() -> None:
    """So that a run that goes on can take an image to be as large as it was padded when the run began."""
    for num_crops in (1, 2, 4, 7, 16):
        for width, height in itertools.product([1, 5, 7, 48, 335, 336, 337, 500, 1344, 3000], repeat=2):
            with contextlib.suppress(InputError):  # too elongated
                h, w = hd_size(width, height, num_crops)
                assert hd_size(w, h, num_crops) == (h, w), (width, height, num_crops)


def test_hd_size_is_what_hd_transform_makes() -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 300, size=(60, 2)).tolist():
        for num_crops in (1, 4, 9):
            try:
                size = hd_size(width, height, num_crops)
            except InputError:
                continue
            assert hd_transform(Image.new("RGB", (width, height)), num_crops).shape[:2] == size
            assert num_tiles(*size) <= num_crops


def test_tokens_by_counting_rows() -> None:
    for a in range(1, 5):
        for b in range(1, 5):
            local, separator, overview = 12 * a * (12 * b + 1), 1, 12 * 13
            assert num_image_tokens(a * CROP, b * CROP) == local + separator + overview


def test_tiles_are_row_major() -> None:
    hd = np.zeros((2 * CROP, 3 * CROP, 3), dtype=np.uint8)
    for row in range(2):
        for column in range(3):
            hd[row * CROP : (row + 1) * CROP, column * CROP : (column + 1) * CROP] = 10 * row + column
    assert tiles_of(hd).amax(dim=(1, 2, 3)).tolist() == [0, 1, 2, 10, 11, 12]


def test_one_crop_is_its_own_global_view() -> None:
    tiles = normalize(torch.randint(0, 256, (1, 3, CROP, CROP), dtype=torch.uint8))
    assert torch.equal(global_view(tiles, CROP, CROP), tiles[0])


def test_normalize_leaves_its_input_alone() -> None:
    for dtype in (torch.uint8, torch.float32):
        tiles = torch.full((1, 3, 2, 2), 255, dtype=dtype)
        assert normalize(tiles).amax() < 3
        assert tiles.amin() == 255


def test_modes_become_rgb(tmp_path: Path) -> None:
    gray16 = Image.fromarray(np.array([[0, 100, 255, 256, 65535]], dtype=np.uint16))
    assert np.asarray(load_image(gray16))[0, :, 0].tolist() == [0, 100, 255, 255, 255]  # clipped, not scaled
    rgba = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load_image(rgba).getpixel((0, 0)) == (10, 20, 30)  # alpha dropped, not blended
    rotated = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    rotated.save(tmp_path / "rotated.jpg", exif=exif)
    assert load_image(tmp_path / "rotated.jpg").size == (4, 2)


def test_bad_files(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(good)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    assert load_image(good).size == read_size(good) == (40, 50)
    for name, reason in {"missing.png": "no such", "text.png": "unreadable", "empty.png": "unreadable"}.items():
        for function in (load_image, read_size):
            with pytest.raises(InputError, match=rf"{name}: {reason}"):
                function(tmp_path / name)
    with pytest.raises(InputError, match=r"cut.png: unreadable image \(.*truncated"):
        load_image(tmp_path / "cut.png")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match=r"large.png: 10000x9000 is more than 89478485 pixels"):
        load_image(tmp_path / "large.png")
    with pytest.raises(InputError, match="unreadable"):
        load_image(tmp_path)


def test_decompression_bomb(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30_000, 10_000)).save(bomb)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"bomb.png: absurdly large"):
        load_image(bomb)
    with pytest.raises(InputError, match=r"bomb.png: absurdly large"):
        read_size(bomb)


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 20), (10, 200, 30))
    for format in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        picture.save(tmp_path / "picture.txt", format)
        assert load_image(tmp_path / "picture.txt").size == read_size(tmp_path / "picture.txt") == (30, 20)
    for format in ("EPS", "ICO", "TGA", "PCX", "JPEG2000"):  # Pillow reads them all, EPS by starting Ghostscript
        picture.save(tmp_path / "picture.png", format)
        for function in (load_image, read_size, read_info):
            with pytest.raises(InputError, match=r"picture.png: unreadable image \(not AVIF, BMP, .*, or damaged\)"):
                function(tmp_path / "picture.png")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for file in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        for function in (load_image, read_size, read_info):
            with pytest.raises(InputError, match=rf"{file.name}: unreadable image \(not a file\)"):
                function(file)


def test_pictures_without_pixels() -> None:
    for size in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match="no pixels"):
            load_image(Image.new("RGB", size))


def test_warnings_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """Pillow warns of a palette with transparency; whoever turns warnings into errors reads the same pictures."""
    picture = Image.new("P", (3, 3))
    picture.save(tmp_path / "palette.png", transparency=b"\0\x7f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "palette.png").mode == "RGB"


def test_the_picture_of_a_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    wide = Image.new("RGB", (30, 20))
    for orientation, rotated in ((1, False), (6, True), (8, True), (9, False), (0, False)):
        exif[EXIF_ORIENTATION] = orientation
        wide.save(tmp_path / "a.jpg", exif=exif)
        assert (info := read_info(tmp_path / "a.jpg"))[:3] == ((30, 20), orientation if rotated else 0, False)
        assert bool(info.orientation) == rotated
    exif[EXIF_ORIENTATION] = 6
    wide.save(tmp_path / "a.tif", exif=exif)  # the one format that Pillow turns itself
    assert read_info(tmp_path / "a.tif")[:3] == ((20, 30), 0, False)
    assert read_size(tmp_path / "a.tif") == load_image(tmp_path / "a.tif").size == (20, 30)
    wide.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (30, 20), "red")])
    assert read_info(tmp_path / "a.gif")[:3] == ((30, 20), 0, True)
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (0, 0, 0)
    whole = (tmp_path / "a.gif").read_bytes()
    for end in range(len(whole) - 60, len(whole)):  # damage in the second frame, which nobody looks at
        (tmp_path / "a.gif").write_bytes(whole[:end])
        assert read_info(tmp_path / "a.gif").size == load_image(tmp_path / "a.gif").size == (30, 20)


UPRIGHT = ImageRules(exif_orientation="apply")
VISIBLE = ImageRules(image_colors="visible")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_orientation_is_applied_when_asked_and_the_header_says_the_size(format: str, tmp_path: Path) -> None:
    wide = Image.new("RGB", (32, 16), "white")
    wide.paste("red", (0, 0, 16, 16))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        wide.save(tmp_path / "a", format, exif=exif, **({"quality": 100} if format in ("JPEG", "WEBP") else {}))
        with Image.open(tmp_path / "a") as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        found = load_image(tmp_path / "a", UPRIGHT)
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert read_size(tmp_path / "a", UPRIGHT) == read_info(tmp_path / "a").seen(UPRIGHT) == found.size


def drawing(strokes: Any, ground: Any, mode: str) -> Image.Image:
    image = Image.new(mode, (20, 10), ground)
    image.paste(strokes, (5, 5, 15, 6))
    return image


BLANK = {
    "16 bits": Image.fromarray(np.linspace(1000, 60000, 200).reshape(10, 20).astype(np.uint16)),
    "32 bits": Image.fromarray(np.linspace(-70000, -300, 200).reshape(10, 20).astype(np.int32)),
    "float": Image.fromarray(np.linspace(0, 1, 200).reshape(10, 20).astype(np.float32)),
    "black on nothing": drawing((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"),
    "white on nothing": drawing((255, 255, 255, 255), (255, 255, 255, 0), "RGBA"),
    "grey and alpha": drawing((0, 255), (0, 0), "LA"),
}


@pytest.mark.parametrize("kind", BLANK)
def test_what_the_published_rules_lose_is_measured_and_the_others_show_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if BLANK[kind].mode in ("I", "F") else "a.png")
    BLANK[kind].save(path)
    info = read_info(path)
    assert info.clipped + info.transparent == 1
    assert (info.transparent == 1) == (BLANK[kind].mode in ("LA", "RGBA"))
    assert load_image(path).convert("L").getextrema() in [(0, 0), (255, 255), (0, 1)]
    assert load_image(path, VISIBLE).convert("L").getextrema() == (0, 255)
    shades = np.asarray(load_image(path, VISIBLE).convert("L"), dtype=int).flatten()
    assert kind.endswith(("nothing", "alpha")) or (np.diff(shades) >= 0).all(), "scaled, in the same order"


def test_the_share_that_is_lost() -> None:
    values = np.full((10, 10), 200, np.uint16)
    values[:3] = 300
    assert image_info(Image.fromarray(values)).clipped == 0.3
    assert image_info(Image.fromarray(np.full((10, 10), 70000, np.int32))).clipped == 1, "one color in the file as well"
    icon = Image.new("RGBA", (10, 10), (255, 0, 0, 255))
    icon.paste((0, 0, 0, 0), (0, 0, 10, 4))
    assert image_info(icon).transparent == 0.4


def image_info(image: Image.Image) -> ImageInfo:
    with tempfile.TemporaryDirectory() as folder:
        image.save(path := Path(folder) / "a.tif", "TIFF")
        return read_info(path)


def test_what_loses_nothing_is_the_same_under_all_rules() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, 20, 4), dtype=np.uint8)
    opaque = noise.copy()
    opaque[..., 3] = 255
    for image in (Image.fromarray(noise[..., :3]), Image.fromarray(opaque), Image.fromarray(noise[..., 0] * 1.0)):
        assert np.array_equal(np.asarray(load_image(image)), np.asarray(load_image(image, VISIBLE)))


def test_the_look_of_an_image_survives_another_format_and_not_another_content(tmp_path: Path) -> None:
    looks = []
    for seed, name, size, options in (
        (0, "a.png", (64, 48), {}),
        (0, "a.jpg", (64, 48), {"quality": 70}),
        (0, "large.png", (160, 120), {}),
        (1, "b.png", (64, 48), {}),
    ):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).resize(size).save(tmp_path / name, **options)
        looks.append(np.frombuffer(read_info(tmp_path / name).look, np.uint8).astype(int))
        assert len(looks[-1]) == LOOK
    distances = [abs(look - looks[0]).max() for look in looks]
    assert max(distances[:3]) <= 2 < distances[3]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_raise_input_errors_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif"):
        path = tmp_path / f"picture.{suffix}"
        picture.save(path)
        original = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(original)
            for place in rng.integers(0, len(damaged), size=4):
                damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)])
            with contextlib.suppress(InputError):  # some damage leaves a readable picture
                load_image(path)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (336, 336), (1200, 100), (7, 5)])
def test_padding_is_what_the_transform_adds(size: tuple[int, int]) -> None:
    hd = hd_transform(Image.new("RGB", size, "black"), 4)
    left, top, right, bottom = hd_padding(*size, 4)
    h, w, _ = hd.shape
    assert (hd[top : h - bottom, left : w - right] == 0).all()
    assert (hd == 255).all(axis=2).sum() == h * w - (h - top - bottom) * (w - left - right)


def test_colors_undo_the_normalization() -> None:
    tiles = torch.arange(256, dtype=torch.uint8).repeat(3 * CROP * CROP // 256 + 1)[: 3 * CROP * CROP]
    tiles = tiles.reshape(1, 3, CROP, CROP)
    assert torch.equal(colors(normalize(tiles)), tiles)
    assert colors(torch.full((3, 1, 1), 9.0)).tolist() == [[[255]]] * 3
