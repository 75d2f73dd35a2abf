"""Frames of a video, evenly spread over those that decode, since the count in the header is only a guess.

Some files announce 444 frames and hold 68; XVID with B-frames often lacks one or two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from PIL import Image

from phi3v.base.errors import InputError
from phi3v.data.image import MAX_PIXELS


def sample_frames(path: str | Path, num_frames: int) -> list[Image.Image]:
    """`num_frames` RGB images of a video in order, beginning with its first frame; no more are in memory.

    Raises InputError, naming the file, if it is missing, cut short, damaged or has fewer frames, and if PyAV is not
    installed.
    """
    frames, num_decoded = _decode(path, num_frames)
    if num_decoded < num_frames:
        raise InputError(f"{path}: {num_decoded} frames decode, {num_frames} are needed")
    wanted = frame_indices(num_decoded, num_frames)
    if frames.keys() != set(wanted):  # the header is wrong
        frames, _ = _decode(path, num_frames, num_decoded)
    return [frames[index] for index in wanted]


def frame_indices(num_in_video: int, num_frames: int) -> list[int]:
    """Where `num_frames` equal parts of a video begin: floor(k * num_in_video / num_frames).

    The original's np.arange(0, total, total / n).astype(int) is the same where total / n is exact in binary, so always
    for its 8 frames. Elsewhere it sometimes has a frame too many (7 of 17) or the one before (18 of 294).
    """
    return [k * num_in_video // num_frames for k in range(num_frames)]


def pyav() -> ModuleType:
    """PyAV. Raises InputError, naming the extra, if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise InputError("videos are read by PyAV: pip install 'phi3v[video]'") from error
    return av


def _decode(path: str | Path, num_frames: int, num_in_video: int | None = None) -> tuple[dict[int, Image.Image], int]:
    """Images of the wanted frames by index, and the number of frames.

    num_in_video: number of frames to choose from. Default: the header's.
    """
    frames: dict[int, Image.Image] = {}
    count = 0
    with _reading(path) as video:
        stream = video.streams.video[0]
        stream.thread_type = "NONE"  # several videos are read at once, by a process on every core
        wanted = set(frame_indices(stream.frames if num_in_video is None else num_in_video, num_frames))
        for frame in video.decode(stream):
            if frame.width * frame.height > MAX_PIXELS:
                raise InputError(f"{path}: {frame.width}x{frame.height} is more than {MAX_PIXELS} pixels")
            if count in wanted:
                frames[count] = frame.to_image()
            count += 1
    return frames, count


@contextmanager
def _reading(path: str | Path) -> Iterator[Any]:
    """An open video, an av.container.InputContainer, that opens no other file, as a playlist would."""
    av = pyav()
    try:
        with open(path, "rb") as file:
            _check_whole(path, file)
            options = {"protocol_whitelist": "none"}
            with av.open(file, options=options, metadata_errors="ignore") as video:
                if not video.streams.video:
                    raise InputError(f"{path}: there is no video in it")
                yield video
    except FileNotFoundError:
        raise InputError(f"{path}: no such video") from None
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: unreadable video ({error.strerror})") from error


def _check_whole(path: str | Path, file: IO[bytes]) -> None:
    """Raises InputError for an AVI that is shorter than its first chunk says. What is there would still decode."""
    start = file.read(8)
    num_bytes = os.fstat(file.fileno()).st_size
    if start[:4] == b"RIFF" and num_bytes < (announced := 8 + int.from_bytes(start[4:], "little")):
        raise InputError(f"{path}: cut short, {num_bytes:,} of {announced:,} bytes are there")
    file.seek(0)
