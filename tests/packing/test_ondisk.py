"""A sequence in a file is the sequence, costs no memory, and says where it lies when the disk is full."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest

from phi3v.base.errors import InputError
from phi3v.packing.ondisk import OnDisk


def kept(items: list[Any]) -> OnDisk[Any]:
    found = OnDisk[Any]()
    found.extend(items[:3])
    found.extend(items[3:])
    return found


@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_it_is_the_sequence(count: int) -> None:
    items = [("text", number, None) for number in range(count)]
    found = kept(items)
    assert list(found) == items
    assert len(found) == count
    assert found[:] == items
    assert (found[1::2], found[-2:], found[::-3]) == (items[1::2], items[-2:], items[::-3])
    for number in range(count):
        assert found[number] == items[number] == found[number - count]
    for beyond in (count, -count - 1):
        with pytest.raises(IndexError):
            found[beyond]


def test_items_come_after_others_were_read() -> None:
    found = kept(["a", "b"])
    assert found[0] == "a"
    found.extend(["c"])
    assert list(found) == ["a", "b", "c"]


def test_memory_does_not_grow_with_the_items() -> None:
    tracemalloc.start()
    found = OnDisk[bytes]()
    for _ in range(1000):
        found.extend([os.urandom(1000)])
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 100_000
    assert len(found[999]) == 1000


def test_a_forked_process_reads_it_as_well() -> None:
    """At the same time: neither moves the place where the other reads."""
    found = kept(list(range(1000)))
    child = os.fork()
    right = list(found) == list(range(1000))
    if child == 0:
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right


def test_the_file_has_no_name_and_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()  # of other tests
    before = len(os.listdir("/proc/self/fd"))
    found = kept(["a"])
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that nobody closed
        del found
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


FULL = """
import resource, signal
from phi3v.packing.ondisk import OnDisk
from phi3v.base.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
found = OnDisk()
found.extend([b"a" * 500])
try:
    found.extend([b"b" * 900])
except InputError as error:
    print(error)
assert found[:] == [b"a" * 500]
"""


def test_a_full_disk_is_named_in_one_line(tmp_path: Path) -> None:
    """And what was written before is there; nothing more is said when the process ends."""
    done = subprocess.run(
        [sys.executable, "-c", FULL], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path}: File too large; the data set is kept there (TMPDIR names another)\n"
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=rf"{tmp_path}/gone: No such file or directory; the data set is kept there"):
        OnDisk[str]()
