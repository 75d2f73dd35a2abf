"""Unpacking: every format gives the same folder; what is hostile or damaged leaves none."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
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


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
FORMATS: dict[str, Callable[[Iterable[Entry]], bytes]] = {
    "tar": tar_of,
    **{
        f"tar.{name}": lambda entries, compress=compress: compress(tar_of(entries))
        for name, compress in COMPRESSORS.items()
    },
    "zip": zip_of,
}


@pytest.fixture(params=FORMATS)
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes an archive of the format of the test, whose bytes may be changed."""

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
    archive, counts = build(entries()), []
    unpack(archive, tmp_path / "out", counts.append)
    assert files_in(tmp_path / "out") == TREE
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


@pytest.mark.parametrize("name", ["../evil", "set/../../evil", "/../evil"])
def test_escapes(build: Callable[..., Path], name: str, tmp_path: Path) -> None:
    refused(build([*entries(), (name, b"evil", stat.S_IFREG | 0o644)]), "evil' (leads out|.*outside the destination)")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(("mode", "content"), [(stat.S_IFLNK, b"/etc"), (stat.S_IFLNK, b"../.."), (stat.S_IFIFO, b"")])
def test_links_to_elsewhere_and_devices(mode: int, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tar_of([*entries(), ("set/odd", content, mode | 0o777)]))
    refused(tmp_path / "set.tar", "damaged, cut short or refused .*'set/odd'")


def test_too_many_bytes(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_BYTES", 81_000)
    refused(build(entries()), "more than 0 GiB unpacked")


def test_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """A tar header of 512 bytes announces a terabyte."""
    info = tarfile.TarInfo("zeros")
    info.size = 2**40
    (tmp_path / "set.tar").write_bytes(info.tobuf() + bytes(10240))
    refused(tmp_path / "set.tar", "more than 64 GiB unpacked")


def test_cut_short(build: Callable[..., Path]) -> None:
    few = entries({f"set/{number}.avi": np.random.default_rng(number).bytes(5000) for number in range(2)})
    for share in (0.1, 0.4, 0.55):
        refused(build(few, lambda data, share=share: data[: int(share * len(data))]), "damaged, cut short")


@pytest.mark.parametrize("content", [b"", b"<html>log in first</html>", b"PK\5\6" + bytes(18), bytes(10240)])
def test_no_archive_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.tar").write_bytes(content)
    refused(tmp_path / "set.tar", "damaged|there is no file in it")
    with pytest.raises(InputError, match=r"gone\.zip: no such archive"):
        unpack(tmp_path / "gone.zip", tmp_path / "out")


def test_rar(tmp_path: Path) -> None:
    (tmp_path / "set.rar").write_bytes(b"Rar!\x1a\x07\x00" + bytes(50))
    refused(tmp_path / "set.rar", "RAR archives are not supported: unpack it first, and name the folder")


def test_encrypted_zip(tmp_path: Path) -> None:
    data = bytearray(zip_of(entries()))
    data[data.index(b"PK\1\2", data.index(b"PK\1\2") + 1) + 8] |= 1
    (tmp_path / "set.zip").write_bytes(data)
    refused(tmp_path / "set.zip", "encrypted")


def test_full_disk(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: Any, **also: Any) -> Any:
        raise OSError(28, "No space left on device")

    archive = build(entries())
    monkeypatch.setattr(tarfile, "copyfileobj", full)
    monkeypatch.setattr(zipfile.shutil, "copyfileobj", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        unpack(archive, archive.parent / "out")
    assert not (archive.parent / "out").exists()
