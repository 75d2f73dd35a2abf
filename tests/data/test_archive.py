"""Unpacking: every format gives the same folder; what is hostile or damaged leaves none."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3v.base.errors import InputError
from phi3v.data import archive as room
from phi3v.data.archive import unpack

TREE = {"set/a/one.avi": bytes(range(256)) * 300, "set/a/empty.avi": b"", "set/b/zwei ü.avi": b"x" * 5000}
Entry = tuple[str, bytes | None, int]  # name, content (None: a folder), Unix mode


def entries(tree: dict[str, bytes] = TREE) -> list[Entry]:
    return [("set/", None, stat.S_IFDIR | 0o755), *((name, data, stat.S_IFREG | 0o644) for name, data in tree.items())]


def tar_of(entries: Iterable[Entry]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data, mode in entries:
            info = tarfile.TarInfo(name)
            info.mode = stat.S_IMODE(mode)
            if data is None:
                info.type = tarfile.DIRTYPE
            elif stat.S_ISLNK(mode):
                info.type, info.linkname = tarfile.SYMTYPE, data.decode()
            elif stat.S_ISFIFO(mode):
                info.type = tarfile.FIFOTYPE
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return stream.getvalue()


def zip_of(entries: Iterable[Entry]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, data or b"", zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def rar_of(entries: Iterable[Entry]) -> bytes:
    """A RAR of version 3, with its members stored as they are (the layout is UnRAR's technote.txt)."""

    def block(kind: int, flags: int, body: bytes) -> bytes:
        head = struct.pack("<BHH", kind, flags, 7 + len(body)) + body
        return struct.pack("<H", zlib.crc32(head) & 0xFFFF) + head

    blocks = [b"Rar!\x1a\x07\x00", block(0x73, 0, bytes(6))]
    for name, data, mode in entries:
        encoded, content = name.rstrip("/").encode("ascii", "replace"), data or b""
        fields = (len(content), len(content), 3, zlib.crc32(content), 0, 20, 0x30, len(encoded), mode)
        flags = 0x8000 | (0xE0 if data is None else 0)
        blocks += [block(0x74, flags, struct.pack("<IIBIIBBHI", *fields) + encoded), content]
    return b"".join([*blocks, block(0x7B, 0x4000, b"")])


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
FORMATS: dict[str, Callable[[Iterable[Entry]], bytes]] = {
    "tar": tar_of,
    **{
        f"tar.{name}": lambda entries, compress=compress: compress(tar_of(entries))
        for name, compress in COMPRESSORS.items()
    },
    "zip": zip_of,
    "rar": rar_of,
}


@pytest.fixture(params=FORMATS)
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes an archive of the format of the test, whose bytes may be changed."""
    if request.param == "rar":
        pytest.importorskip("unrar.cffi", reason="unrar2-cffi is not installed: pip install 'phi3v[rar]'")

    def build(entries: Iterable[Entry], change: Callable[[bytes], bytes] = lambda data: data) -> Path:
        path = tmp_path / f"set.{request.param}"
        path.write_bytes(change(FORMATS[request.param](entries)))
        return path

    return build


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(archive: Path, match: str) -> None:
    """Unpacking names the archive and leaves nothing at all."""
    before = sorted(archive.parent.rglob("*"))
    with pytest.raises(InputError, match=match) as caught:
        unpack(archive, archive.parent / "out")
    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(archive.parent.rglob("*")) == before


def test_every_format_gives_the_same_folder(build: Callable[..., Path], tmp_path: Path) -> None:
    tree = TREE if "rar" not in str(build(entries())) else {name.replace("ü", "?"): data for name, data in TREE.items()}
    archive, counts = build(entries()), []
    unpack(archive, tmp_path / "out", counts.append)
    assert files_in(tmp_path / "out") == tree
    assert 0 < sum(counts) <= archive.stat().st_size
    assert all(count >= 0 for count in counts)


def test_kind_is_read_from_the_content_not_the_name(tmp_path: Path) -> None:
    """The published UCF101_subset.tar.gz is a plain tar."""
    (tmp_path / "set.tar.gz").write_bytes(tar_of(entries()))
    unpack(tmp_path / "set.tar.gz", tmp_path / "out")
    assert files_in(tmp_path / "out") == TREE


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "no such.zip", tmp_path / "out")
    assert not files_in(tmp_path / "out")


def test_remains_of_a_killed_run_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(zip_of(entries()))
    (tmp_path / ".out.unfinished/set").mkdir(parents=True)
    (tmp_path / ".out.unfinished/set/half.avi").write_bytes(b"half")
    unpack(tmp_path / "set.zip", tmp_path / "out")
    assert files_in(tmp_path / "out") == TREE


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "set/../../evil",
        "/tmp/phi3v-evil",
        "..\\evil",
        "set\\..\\..\\evil",
        "C:\\evil",
        "C:evil",
        "\\\\host\\share\\evil",
    ],
)
def test_escapes(build: Callable[..., Path], name: str) -> None:
    refused(build([*entries(), (name, b"evil", stat.S_IFREG | 0o644)]), "evil' leads out of the archive's folder")


@pytest.mark.parametrize(("mode", "kind"), [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "a device")])
def test_links_and_devices(build: Callable[..., Path], mode: int, kind: str) -> None:
    refused(
        build([*entries(), ("set/odd", b"/etc", mode | 0o777)]),
        f"member 'set/odd' is (a link or device|{kind}), not a file",
    )


def test_hard_links(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        info = tarfile.TarInfo("set/hard")
        info.type, info.linkname = tarfile.LNKTYPE, "../../etc/passwd"
        tar.addfile(info)
    refused(tmp_path / "set.tar", "member 'set/hard' is a link or device, not a file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name", ["set/a/one.avi", "set\\a\\one.avi", "set/./a/one.avi", "set/a", "set/a/one.avi/in", "."]
)
def test_names_that_are_taken(build: Callable[..., Path], name: str) -> None:
    refused(build([*entries(), (name, b"again", stat.S_IFREG | 0o644)]), "is there already")


def test_too_many_members(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_MEMBERS", 3)
    refused(build(entries()), "zwei .*' comes after 3 others")


def test_too_many_bytes(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "HARMLESS_BYTES", 81_000)
    monkeypatch.setattr(room, "MAX_RATIO", 0)
    refused(build(entries()), "zwei .*' makes it more than 0 times the size")


def test_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """A tar header of 512 bytes announces a terabyte."""
    info = tarfile.TarInfo("zeros")
    info.size = 2**40
    (tmp_path / "set.tar").write_bytes(info.tobuf() + bytes(10240))
    refused(tmp_path / "set.tar", "'zeros' makes it more than 200 times the size of the archive")


def test_names_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(info.tobuf() + bytes(2**21)))
    refused(tmp_path / "set.tar.gz", "a header of 1,073,741,824 bytes")


def test_cut_short(build: Callable[..., Path]) -> None:
    """Wherever an archive stops; only between two members of a RAR, whose old versions have no end mark, it may."""
    few = entries({f"set/{number}.avi": b"abc" * (20 + number) for number in range(4)})
    whole = build(few).read_bytes()
    end = len(whole)
    if whole.startswith(b"set/"):  # a tar: within its end mark, after which there is only padding
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 2 * 512
    for size in range(0, end, 7 if end < 1000 else 101):
        refused(build(few, lambda data, size=size: data[:size]), "damaged|there is no file in it")


def test_tar_without_its_end_mark(tmp_path: Path) -> None:
    """A download that stopped between two members would look whole."""
    data = tar_of(entries())
    start = data.index(b"set/a/empty.avi") // 512 * 512
    (tmp_path / "set.tar").write_bytes(data[:start])
    refused(tmp_path / "set.tar", "no end mark")


@pytest.mark.filterwarnings("ignore")
def test_flipped_bits(build: Callable[..., Path], tmp_path: Path) -> None:
    """What is damaged is refused, or no file differs for it; a plain tar alone has no checksums for its files."""
    random = np.random.default_rng(0)
    num_refused = 0
    for number in range(30):
        path, out = build(entries(), lambda data: flipped(data, random)), tmp_path / "outs" / str(number)
        try:
            unpack(path, out)
        except InputError:
            num_refused += 1
            assert not out.exists()
        else:
            assert path.suffix == ".tar" or {*files_in(out).values()} <= {*TREE.values()}
    assert num_refused > (0 if path.suffix == ".tar" else 15)
    assert {entry.name for entry in (tmp_path / "outs").iterdir()} <= {str(number) for number in range(30)}


def flipped(data: bytes, random: np.random.Generator) -> bytes:
    place = random.integers(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.integers(8)]) + data[place + 1 :]


def test_checksum_of_compressed_data_is_compared(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(tar_of(entries())))
    data[-6] ^= 1  # of the CRC itself: every byte unpacks
    (tmp_path / "set.tgz").write_bytes(data)
    refused(tmp_path / "set.tgz", "CRC check failed")


@pytest.mark.parametrize(
    "content", [b"", b"<html>log in first</html>", b"PK\5\6" + bytes(18), bytes(10240), b"Rar!\x1a\x07\x00"]
)
def test_no_archive_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.tar").write_bytes(content)
    refused(tmp_path / "set.tar", "damaged|there is no file in it|nothing here unpacks")
    with pytest.raises(InputError, match=r"gone\.zip: no such archive"):
        unpack(tmp_path / "gone.zip", tmp_path / "out")


def test_encrypted_zip(tmp_path: Path) -> None:
    data = bytearray(zip_of(entries()))
    data[data.index(b"PK\1\2", data.index(b"PK\1\2") + 1) + 8] |= 1
    (tmp_path / "set.zip").write_bytes(data)
    refused(tmp_path / "set.zip", "encrypted")


def test_size_that_is_not_the_one_announced(tmp_path: Path) -> None:
    data = bytearray(zip_of([("a", b"x" * 100, stat.S_IFREG)]))
    data[data.index(b"PK\1\2") + 24] += 1
    (tmp_path / "set.zip").write_bytes(data)
    refused(tmp_path / "set.zip", "member 'a' has 100 bytes, 101 are announced")


def test_links_in_a_new_rar(tmp_path: Path) -> None:
    """RAR 5 has a record for them, here of a hard link to ../x (the layout is WinRAR's technote on RAR 5)."""
    pytest.importorskip("unrar.cffi", reason="unrar2-cffi is not installed: pip install 'phi3v[rar]'")

    def block(*fields: int, extra: bytes = b"") -> bytes:
        body = bytes(fields) + extra
        body = bytes([len(body)]) + body
        return struct.pack("<I", zlib.crc32(body)) + body

    link = bytes([5, 4, 0, 4]) + b"../x"  # type, kind, flags, length of the name
    record = bytes([len(link)]) + link
    member = (2, 3, len(record), 0, 4, 0, 0o44, *bytes(4), 0, 1, 1, *b"y")
    content = b"Rar!\x1a\x07\x01\x00" + block(1, 0, 0) + block(*member, extra=record) + block(5, 0, 0)
    (tmp_path / "set.rar").write_bytes(content)
    refused(tmp_path / "set.rar", "member 'y' is a link, not a file")


def test_full_disk(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    archive = build(entries())
    full = OSError(28, "No space left on device")

    def fails(*unused: Any, **also: Any) -> Any:
        raise full

    monkeypatch.setattr(room.shutil, "copyfileobj", fails)
    monkeypatch.setattr(room, "_copy_rar", fails)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        unpack(archive, archive.parent / "out")
    assert not (archive.parent / "out").exists()


def test_errors_pass_through_unrar(tmp_path: Path) -> None:
    """UnRAR calls back from C, through which no exception passes."""
    pytest.importorskip("unrar.cffi", reason="unrar2-cffi is not installed: pip install 'phi3v[rar]'")
    (tmp_path / "set.rar").write_bytes(rar_of(entries({"one": b"1", "two": b"2"})))

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    members = room._rar(tmp_path / "set.rar")
    next(members)
    with pytest.raises(OSError, match="No space left"):
        next(members).copy(Full())


def test_rar_without_an_unpacker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unrar.cffi.unrarlib", None)
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    (tmp_path / "set.rar").write_bytes(rar_of(entries()))
    refused(tmp_path / "set.rar", r"pip install 'phi3v\[rar\]', or install the command bsdtar")


@pytest.mark.parametrize(("status", "num_bytes"), [(0, None), (1, None), (0, 100)])
def test_rar_by_the_command_bsdtar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, num_bytes: int | None
) -> None:
    """It hands the archive on as a tar; that it failed, its status says or a tar that is not whole."""
    monkeypatch.setitem(sys.modules, "unrar.cffi.unrarlib", None)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    (tmp_path / "as.tar").write_bytes(tar_of(entries())[:num_bytes])
    command = tmp_path / "bin/bsdtar"
    command.write_text(f'#!/bin/sh\ntest "$5" = "@{tmp_path}/set.rar" && cat {tmp_path}/as.tar\nexit {status}\n')
    command.chmod(0o755)
    (tmp_path / "set.rar").write_bytes(rar_of(entries()))
    if status or num_bytes:
        refused(tmp_path / "set.rar", "bsdtar cannot read it; pip install")
    else:
        unpack(tmp_path / "set.rar", tmp_path / "out")
        assert files_in(tmp_path / "out") == TREE
