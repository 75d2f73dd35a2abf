"""Archives from elsewhere, unpacked whole and nowhere but into their own folder.

A folder that `unpack` made is whole: it has another name until its last byte is there. Members that would land outside,
links, devices, names that occur twice and more bytes than an honest archive of its size holds are refused by name. What
kind an archive is, its first bytes say: the published UCF101_subset.tar.gz is a plain tar.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, Any, NamedTuple

from phi3v.base.errors import InputError
from phi3v.base.files import written_whole

MAX_MEMBERS = 1_000_000

MAX_RATIO = 200
"""Unpacked bytes per byte of the archive, once there are more than `HARMLESS_BYTES`; videos have 1, text has 10."""
HARMLESS_BYTES = 2**28

COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


class Member(NamedTuple):
    """An entry of an archive. `copy` writes its content to a file, and only until the next entry is asked for."""

    name: str
    kind: str  # "file", "folder", or in words what else it is
    num_bytes: int
    num_packed_bytes: int
    copy: Callable[[IO[bytes]], object]


def unpack(archive: Path, folder: Path, advance: Callable[[int], object] = lambda count: None) -> None:
    """Unpacks a .tar (plain, .gz, .bz2, .xz), .zip or .rar file to a folder of its own; one that is there is whole.

    `advance` hears of every further byte of the archive that is done. Raises InputError, naming archive and member, for
    what is refused, damaged, cut short or encrypted, and when the disk is full; the folder is not there then.
    """
    if folder.exists():
        return
    if not archive.is_file():
        raise InputError(f"{archive}: no such archive")
    num_bytes_left = max(HARMLESS_BYTES, MAX_RATIO * archive.stat().st_size)
    with written_whole(folder) as unfinished, _reading(archive):
        for number, member in enumerate(_members(archive), start=1):
            num_bytes_left -= member.num_bytes
            reason = _refusal(member, number, num_bytes_left) or _write(member, unfinished)
            if reason:
                raise InputError(f"{archive}: member {member.name!r} {reason}; nothing was unpacked")
            advance(member.num_packed_bytes)
        if not any(path.is_file() for path in unfinished.rglob("*")):
            raise InputError(f"{archive}: there is no file in it")


def _refusal(member: Member, number: int, num_bytes_left: int) -> str | None:
    """Why a member is not even looked into, or None."""
    path = PureWindowsPath(member.name)  # knows drives and both slashes
    if path.anchor or ".." in path.parts or "\0" in member.name:
        return "leads out of the archive's folder"
    if member.kind not in ("file", "folder"):
        return f"is {member.kind}, not a file"
    if number > MAX_MEMBERS:
        return f"comes after {MAX_MEMBERS:,} others, as in a decompression bomb"
    if num_bytes_left < 0:
        return f"makes it more than {MAX_RATIO} times the size of the archive, as in a decompression bomb"
    return None


def _write(member: Member, folder: Path) -> str | None:
    """Puts a member where it belongs; or says why that cannot be."""
    path = folder.joinpath(*PureWindowsPath(member.name).parts)
    try:
        if member.kind == "folder":
            path.mkdir(parents=True, exist_ok=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            member.copy(file)
            if file.tell() != member.num_bytes:
                return f"has {file.tell():,} bytes, {member.num_bytes:,} are announced"
    except (FileExistsError, NotADirectoryError):
        return "is there already"
    return None


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Names the archive in whatever its reader stumbles over; what the system refuses, a full disk, passes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # on damaged archives the readers raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{archive}: damaged, cut short or encrypted ({reason}); nothing was unpacked") from error


# --- the formats ------------------------------------------------------------------------------------------------------


def _members(archive: Path) -> Iterator[Member]:
    with open(archive, "rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        if start.startswith(b"PK"):
            yield from _zip(raw)
        elif start == b"Rar!\x1a\x07":
            yield from _rar(archive)
        else:
            decompress = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
            yield from _tar(decompress(raw) if decompress else raw, raw)


def _zip(raw: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            kind = "folder" if info.is_dir() else _kind(info.external_attr >> 16)
            copy = partial(_copy, partial(archive.open, info))
            yield Member(info.filename, kind, info.file_size, info.compress_size, copy)


def _tar(stream: IO[bytes], raw: IO[bytes] | None = None) -> Iterator[Member]:
    """Members of a tar that is already decompressed; `raw` is the file in which it is compressed."""
    forward, num_bytes_done = _Forward(stream), 0
    with tarfile.open(fileobj=forward, mode="r:") as archive:  # type: ignore[call-overload]
        while (info := archive.next()) is not None:
            archive.members.clear()  # or it remembers a million
            kind = "file" if info.isreg() else "folder" if info.isdir() else "a link or device"
            copy = partial(_copy, partial(archive.extractfile, info))
            num_bytes_more = (raw or forward).tell() - num_bytes_done
            yield Member(info.name, kind, info.size if info.isreg() else 0, num_bytes_more, copy)
            num_bytes_done += num_bytes_more
        # A header that is damaged or missing ends the loop as well: only one of zeros is the end mark.
        if forward.last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark")
        # Checksums of compressed data come last.
        if len(forward.read(_Forward.MAX_BYTES)) == _Forward.MAX_BYTES:
            raise tarfile.ReadError("it goes on after its end mark")


class _Forward:
    """A file read from front to back in small pieces: a tar header may claim a name of gigabytes."""

    MAX_BYTES = 2**20

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.position, self.last = file, 0, b""

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > self.MAX_BYTES:
            raise tarfile.ReadError(f"a header of {num_bytes:,} bytes")
        self.last = self.file.read(num_bytes)
        self.position += len(self.last)
        return self.last

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        assert position >= self.position
        while self.position < position and self.read(min(self.MAX_BYTES, position - self.position)):
            pass


def _rar(archive: Path) -> Iterator[Member]:
    try:
        from unrar.cffi._unrarlib.lib import RARReadHeaderEx
        from unrar.cffi.unrarlib import FLAGS_RHDF_DIRECTORY, RarArchive, RarHeader, RARHeaderDataEx
    except ImportError:
        yield from _rar_by_command(archive)
        return
    end_of_archive, unix = 10, 3
    with RarArchive.open_for_processing(archive) as rar:
        # Its own iterate_headers takes damage for the end.
        while (status := RARReadHeaderEx(rar.handle, data := RARHeaderDataEx())) == 0:
            header = RarHeader(rar, data)
            is_folder = bool(header.Flags & FLAGS_RHDF_DIRECTORY)
            kind = "folder" if is_folder else _kind(data.FileAttr if header.HostOS == unix else 0)
            if data.RedirType:
                kind = "a link"
            size, packed = header.UnpSize + (header.UnpSizeHigh << 32), header.PackSize + (header.PackSizeHigh << 32)
            yield Member(header.FileNameW, kind, size, packed, partial(_copy_rar, header))
            if is_folder:
                header.skip()
        if status != end_of_archive:
            raise EOFError(f"UnRAR's error {status}")


def _copy_rar(header: Any, file: IO[bytes]) -> None:
    errors: list[Exception] = []

    def write(piece: bytes) -> None:  # called from C, through which no exception passes
        try:
            if not errors:
                file.write(piece)
        except Exception as error:
            errors.append(error)

    header.test(write)
    if errors:
        raise errors[0]


def _rar_by_command(archive: Path) -> Iterator[Member]:
    """bsdtar reads many of them, and hands them on as a tar."""
    command = shutil.which("bsdtar")
    if command is None:
        raise InputError(
            f"{archive}: nothing here unpacks .rar: pip install 'phi3v[rar]', or install the command bsdtar (Debian's"
            " libarchive-tools), or unpack it yourself and name the folder"
        )
    arguments = [command, "--format", "pax", "-cf", "-", f"@{archive.resolve()}"]
    understood = True
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield from _tar(process.stdout)
        except tarfile.TarError:
            understood = False
    if process.returncode or not understood:
        raise EOFError("bsdtar cannot read it; pip install 'phi3v[rar]' reads more kinds")


def _copy(source: Callable[[], IO[bytes] | None], file: IO[bytes]) -> None:
    with source() as content:  # type: ignore[union-attr]
        shutil.copyfileobj(content, file)


def _kind(mode: int) -> str:
    """Of a file with this Unix mode; 0 where an archive does not tell."""
    kind = stat.S_IFMT(mode)
    return "file" if kind in (0, stat.S_IFREG) else "a link" if kind == stat.S_IFLNK else "a device"
