"""Small files that ask for much memory do not get it. Each is read by a process that may have just so much more."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from targets import TARGETS, Target

from phi3v.base.errors import InputError
from phi3v.data import image as room
from phi3v.data.image import load_image
from phi3v.data.schema import read_jsonl

MB = 2**20


def limited(limit_mb: int, function: Callable[..., object], *arguments: Any) -> str:
    """The message of the InputError that a call raises ("" if none), in a process with so much more address space."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def call() -> None:
        (pages,) = map(int, Path("/proc/self/statm").read_text().split()[:1])
        limit = pages * resource.getpagesize() + limit_mb * MB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            function(*arguments)
            there.send("")
        except InputError as error:
            there.send(str(error))
        except BaseException as error:
            there.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=call)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"


def use(place: Path, name: str, content: bytes) -> None:
    """What the target does, with its InputErrors."""
    target: Target = TARGETS[name]
    file = place / target.file
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    target.use(place)


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place, tmp_path / "place")
    return tmp_path / "place"


LINES = {
    "no line end": (b"x" * 300 * MB, "train.jsonl:1: longer than 4 MiB"),
    "one array": (b"[" + b'{"id": "1"},' * MB, "longer than 4 MiB: is the file one JSON array?"),
    "brackets": (b"[" * 4_000_000, "nested too deep"),
}


@pytest.mark.parametrize("kind", LINES)
def test_lines(kind: str, tmp_path: Path) -> None:
    content, message = LINES[kind]
    (tmp_path / "train.jsonl").write_bytes(content)
    assert message in limited(300, read_jsonl, tmp_path / "train.jsonl")


def test_a_sparse_image_file_is_not_read(tmp_path: Path) -> None:
    for start in (b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"\0\0\0\x20ftypavif", b"\x89PNG\r\n\x1a\n"):
        file = tmp_path / "sparse"
        with open(file, "wb") as stream:
            stream.write(start)
            stream.truncate(room.MAX_BYTES + 1)
        assert "1.0 GiB is more than 1 GiB" in limited(100, load_image, file)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    found = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in found
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


HEADERS = {
    "png": (png(2**31 - 1, 2**31 - 1), "absurdly large"),
    "png, twice the limit": (png(13_000, 13_000), "13000x13000 is more than 89478485 pixels"),
    "png, no height": (png(7, 0), "unreadable"),
    "png, text": (png(9, 9, (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 400 * MB, 9))), "unreadable"),
    "png, profile": (png(9, 9, (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 400 * MB, 9))), "unreadable"),
    "bmp": (b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0), "absurdly"),
    "gif": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF0, 0, 0) + b"\0\0\0\1\1\1,", "unreadable"),
    "gif, frame": (
        b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0xF0, 0, 0) + b"\0\0\0\1\1\1"
        + struct.pack("<BHHHHB", 0x2C, 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\x00;",
        "absurdly large",
    ),
    "ppm": (b"P6 60000 60000 255\n", "absurdly large"),
    "pfm": (b"PF\n9999999 9999999\n-1.0\n", "unreadable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_image_headers(kind: str, own: Path) -> None:
    content, message = HEADERS[kind]
    said = limited(300, use, own, "image", content)
    assert message in said
    assert "Memory" not in said


def test_bombs_in_a_checkpoint(own: Path) -> None:
    config = json.loads((own / "model/config.json").read_text())
    huge = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 1024, "vocab_size": 2**20}
    said = limited(600, use, own, "config", json.dumps(config | huge | {"rope_scaling": None}).encode())
    assert "has shape [32, 96], expected [65536, 196608]" in said or "is missing" in said
    adapter = json.loads((own / "adapter/adapter_config.json").read_text())
    said = limited(600, use, own, "adapter_config", json.dumps(adapter | {"r": 65536}).encode())
    assert "its rank is 65536" in said


@pytest.mark.slow
@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "PPM"])
def test_the_largest_pictures_that_are_read(format: str, tmp_path: Path) -> None:
    """Three quarters of a GiB a process: the decoded picture, the same as RGB, and what the decoder needs."""
    file = tmp_path / "large"
    Image.new("P" if format == "GIF" else "RGB", (9459, 9459)).save(file, format)
    assert limited(768, load_image, file) == ""
