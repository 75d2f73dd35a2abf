"""What is known of a data file since it was last checked, kept beside it in .NAME.checked.json.

The file is hidden, so that tools that load every JSON file of a folder do not take it for data. It lists the readable
images by fingerprints of 8 bytes, which change with the image file: 100,000 images take about 6 MB.
If there were no problems, it holds the findings as well. Problems are never kept, but found again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import PIL

import phi3v
from phi3v.base.files import file_digest, write_text
from phi3v.data.image import LOOK, ImageInfo
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.statistics import Findings

CHECKER = f"phi3v {phi3v.__version__}, rules 3, Pillow {PIL.__version__}"
"""Raise the number of the rules when `check` finds something else than before."""

IMAGES = np.dtype(f"<u8, <u4, <u4, u1, ?, <f4, <f4, <u8, ({LOOK},)u1")
"""Fingerprint, width, height and the other fields of ImageInfo."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """The content of the file."""

    checker: str
    date: str
    inputs: str
    """What the findings depend on, besides the images."""
    findings: Findings | None
    images: bytes
    """An array of IMAGES, compressed."""

    @functools.cached_property
    def known_images(self) -> dict[int, ImageInfo]:
        """The readable images by fingerprint."""
        table = np.frombuffer(zlib.decompress(self.images), IMAGES).tolist()
        return {number: ImageInfo._make(((w, h), *rest, bytes(look))) for number, w, h, *rest, look in table}

    def findings_of(self, inputs: str, max_tokens: int | None) -> Findings | None:
        """The findings, if they are also those of these inputs as long as no image has changed."""
        found = self.findings
        if found is None or self.inputs != inputs:
            return None
        too_long = max_tokens is not None and found.tokens and found.tokens.max > max_tokens
        return None if too_long else found


def inputs_of(data: Path, processor: Phi3VProcessor | None, sight: str) -> str:
    """What the findings in a data file depend on besides the images; `sight` is how those are seen."""
    tokenizer = processor.tokenizer.backend_tokenizer.to_str() if processor else ""
    digest = hashlib.sha256(tokenizer.encode()).hexdigest()
    return f"{data}, {file_digest(data)}, {sight}, tokenizer {digest}"


def read_stamp(data: Path) -> Stamp | None:
    """The stamp of a data file; None if there is none, or a damaged one, or another checker's."""
    try:
        stamp = msgspec.json.decode(_file(data).read_bytes(), type=Stamp)
        whole = stamp.known_images is not None  # or it raises
        return stamp if whole and stamp.checker == CHECKER else None
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError, zlib.error):
        return None


def write_stamp(data: Path, inputs: str, findings: Findings, images: Mapping[int, ImageInfo]) -> None:
    """Write the stamp of a data file. `images` are the readable ones, by fingerprint. Raises InputError."""
    rows = ((number, *info.size, *info[1:-1], np.frombuffer(info.look, "u1")) for number, info in images.items())
    stamp = Stamp(
        checker=CHECKER,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        inputs=inputs,
        findings=replace(findings, files={}) if findings.ok else None,
        images=zlib.compress(np.fromiter(rows, IMAGES, len(images)).tobytes()),
    )
    write_text(_file(data), msgspec.json.encode(stamp).decode())


def fingerprint(image: str, root: str) -> int:
    """A number of 64 bits that stands for the path below `root`, the size and the time of change; 0 for no file."""
    try:
        status = os.stat(image)
    except OSError:
        return 0
    text = f"{image.removeprefix(root)}\0{status.st_size}\0{status.st_mtime_ns}"
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def _file(data: Path) -> Path:
    return data.with_name(f".{data.name}.checked.json")
