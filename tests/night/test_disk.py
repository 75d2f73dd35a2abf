"""A disk that fills up: the run says so, what was saved stays whole, and given room it goes on as if nothing were."""

from __future__ import annotations

import json
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


def test_a_run_continues_without_checkpoints(night: Any, left_by: LEFT, disk: SmallDisk) -> None:
    run = disk.folder / "run"
    status, said = night.run(run, on_full_disk="continue")
    assert status == 0, said
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    complaints = [line for line in lines if line["kind"] == "complaint"]
    assert [line["step"] for line in complaints] == [4, 6, 9, 10]
    assert all("No space left on device" in line["what"] for line in complaints)
    assert damage(run / "checkpoints/step-000003") is None
    assert _without_checkpoints(left_by(run)) == _without_checkpoints(left_by(night.undisturbed()))


def test_a_log_loses_whole_lines_only(night: Any, left_by: LEFT, disk: SmallDisk) -> None:
    """A full disk takes what fits of a line: half a line would spoil the next, and the report."""
    disk.holds(4000)
    run, filler, step = disk.folder / "run", disk.folder / "filler", "phi3v.train.engines.replicated:Replicated.step"
    flags = {"max_steps": 48, "save_every_steps": 1000, "eval_every_steps": 1000}
    mischief = [["when", step, [10], "fill", filler], ["when", step, [40], "remove", filler]]
    status, said = night.run(run, *mischief, on_full_disk="continue", **flags)
    assert status == 0, said
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    said_of = [line["step"] for line in lines if line["kind"] == "step"]
    assert said_of == sorted(set(said_of))
    assert {*range(1, 10), *range(40, 49)} <= {*said_of} < {*range(1, 49)}
    calm, found = left_by(night.undisturbed(**flags)), left_by(run)
    assert {**calm, "log.jsonl": None} == {**found, "log.jsonl": None}
    status, said = night.run(disk.folder / "strict", mischief[0], **flags)
    assert status == 2
    assert f"error: cannot write {disk.folder}/strict/log.jsonl: " in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_disks_of_every_size(on_full_disk: str, night: Any, left_by: LEFT, disk: SmallDisk) -> None:
    """Wherever it is that the disk is full: one line says so, and with room the run goes on, whole."""
    told, sizes = set(), range(4, 3400, 40)
    for kib in sizes:
        disk.holds(kib)
        run = disk.folder / "run"
        status, said = night.run(run, resume="auto", on_full_disk=on_full_disk)
        assert status in (0, 2), f"{kib} KiB: {said}"
        if status == 2:
            error = said.splitlines()[-1]
            assert error.startswith("error: cannot ")
            assert "No space left on device" in error
            told.add(error.split(": ")[1])
        disk.holds(8000)
        status, said = night.run(run, resume="auto", on_full_disk=on_full_disk)
        assert status == 0, f"{kib} KiB: {said}"
        found, calm = left_by(run), left_by(night.undisturbed())
        if on_full_disk == "continue":  # without some checkpoints, and some lines of the log
            found, calm = ({**_without_checkpoints(left), "log.jsonl": None} for left in (found, calm))
        assert found == calm, f"{kib} KiB"
        subprocess.run(["rm", "-r", run], check=True)
    print(f"{len(sizes)} disks of {sizes[0]} to {sizes[-1]} KiB; full at: {sorted(told)}")


def _without_checkpoints(left: dict[str, Any]) -> dict[str, Any]:
    return {name: content for name, content in left.items() if not name.startswith("checkpoints/")}
