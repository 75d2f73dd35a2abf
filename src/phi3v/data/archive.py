"""Unpack downloaded archives, whole or not at all, and nowhere but into their own folder.

The kind of an archive is read from its content: the published UCF101_subset.tar.gz is a plain tar.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3v.base.errors import InputError
from phi3v.base.files import written_whole

MAX_BYTES = 2**36
"""Most unpacked bytes; the full UCF101 has a tenth of it."""

Advance = Callable[[int], object]


def unpack(archive: Path, folder: Path, advance: Advance = lambda count: None) -> None:
    """Unpack a .zip or a .tar (plain, .gz, .bz2, .xz) to `folder`, unless that is there already.

    `advance` is called with the number of archive bytes that are done. Raises InputError, naming the archive, if it is
    damaged, encrypted or too large, a member leads out of the folder, or the disk is full; then there is no folder.
    """
    if folder.exists():
        return
    if not archive.is_file():
        raise InputError(f"{archive}: no such archive")
    with open(archive, "rb") as stream:
        start = stream.read(6)
    if start == b"Rar!\x1a\x07":
        raise InputError(f"{archive}: RAR archives are not supported: unpack it first, and name the folder")
    with written_whole(folder) as unfinished, _naming(archive):
        (_unpack_zip if start.startswith(b"PK") else _unpack_tar)(archive, unfinished, advance)
        if not any(path.is_file() for path in unfinished.rglob("*")):
            raise InputError(f"{archive}: there is no file in it")


def _unpack_tar(archive: Path, folder: Path, advance: Advance) -> None:
    with open(archive, "rb") as stream, tarfile.open(fileobj=stream) as tar:
        done, num_bytes = 0, 0
        for member in tar:
            num_bytes += member.size
            _check_size(archive, num_bytes)
            tar.extract(member, folder, filter="data")  # refuses what leads out, and devices
            advance(stream.tell() - done)
            done = stream.tell()


def _unpack_zip(archive: Path, folder: Path, advance: Advance) -> None:
    with zipfile.ZipFile(archive) as zipped:
        _check_size(archive, sum(member.file_size for member in zipped.infolist()))
        for member in zipped.infolist():
            if not (folder / member.filename).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{archive}: member {member.filename!r} leads out of the archive's folder")
            zipped.extract(member, folder)
            advance(member.compress_size)


def _check_size(archive: Path, num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise InputError(f"{archive}: more than {MAX_BYTES / 2**30:.0f} GiB unpacked: unpack it yourself")


@contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """Name the archive in the error of its reader; errors of the disk pass."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # on damaged archives the readers raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{archive}: damaged, cut short or refused ({reason}); nothing was unpacked") from error
