"""A disk that fills up: the run says so, what was saved stays whole, and given room it goes on as if nothing were."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3v.train.checkpoint import damage

LEFT = Callable[[Path], dict[str, Any]]
ONE_CHECKPOINT = 1400  # KiB, with the rest of a run folder


class SmallDisk:
    """A file system of its own, of so many KiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def holds(self, kib: int) -> None:
        mounted = self.folder.is_mount()
        options = f"{'remount,' if mounted else ''}size={kib}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    disk.folder.mkdir()
    try:
        disk.holds(ONE_CHECKPOINT)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", disk.folder], check=True)


def test_a_run_stops_and_goes_on_when_there_is_room(night: Any, left_by: LEFT, disk: SmallDisk) -> None:
    run = disk.folder / "run"
    status, said = night.run(run)
    assert status == 2
    assert f"error: cannot write {run}/checkpoints/step-000004: " in said.splitlines()[-1]
    assert "No space left on device" in said.splitlines()[-1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert damage(run / "checkpoints/step-000003") is None
    disk.holds(8000)
    assert night.run(run, resume="auto")[0] == 0
    assert left_by(run) == left_by(night.undisturbed())


@pytest.mark.slow
def test_disks_of_every_size(night: Any, left_by: LEFT, disk: SmallDisk) -> None:
    """Wherever it is that the disk is full: one line says so, and with room the run goes on, whole."""
    told, sizes = set(), range(4, 3400, 40)
    for kib in sizes:
        disk.holds(kib)
        run = disk.folder / "run"
        status, said = night.run(run, resume="auto")
        assert status in (0, 2), f"{kib} KiB: {said}"
        if status == 2:
            error = said.splitlines()[-1]
            assert error.startswith("error: cannot ")
            assert "No space left on device" in error
            told.add(error.split(": ")[1])
        disk.holds(8000)
        status, said = night.run(run, resume="auto")
        assert status == 0, f"{kib} KiB: {said}"
        assert left_by(run) == left_by(night.undisturbed()), f"{kib} KiB"
        subprocess.run(["rm", "-r", run], check=True)
    print(f"{len(sizes)} disks of {sizes[0]} to {sizes[-1]} KiB; full at: {sorted(told)}")
