"""Data workers that die and images that vanish while a run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

LEFT = Callable[[Path], dict[str, Any]]
STEP = "phi3v.train.loop:seed_step"  # called once at the beginning of every step, before its packs are read


@pytest.mark.parametrize("busy_with", ["loader:make_pack", "workers:send_handle"])
def test_data_workers_are_killed(busy_with: str, night: Any, left_by: LEFT, tmp_path: Path) -> None:
    """Every other step, while they are busy with a pack, or are handing it over."""
    busy = ["when", f"phi3v.packing.{busy_with}", list(range(100)), "sleep", 0.3]
    killer = ["when", "phi3v.train.engines.replicated:Replicated.step", [1, 3, 5, 7, 9], "kill a worker"]
    by_handle = ["put", "phi3v.packing.workers:THROUGH_PIPE", 1000]
    status, said = night.run(tmp_path / "run", busy, killer, by_handle, num_workers=2)
    assert status == 0, said
    assert "a data worker died (exit signal 9; out of memory?); another begins its pack again: " in said
    assert left_by(tmp_path / "run") == left_by(night.undisturbed())


@pytest.fixture
def data(night: Any, tmp_path: Path) -> Path:
    """A copy of the data, to be damaged; the questions beside it are not about what is blue."""
    file = tmp_path / "data/train.jsonl"
    shutil.copytree(night.data.parent, file.parent)
    lines = file.read_text().splitlines(keepends=True)
    file.with_name("eval.jsonl").write_text("".join(line for line in lines if "blue.png" not in line))
    return file


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes_stops_the_run_until_it_is_back(
    workers: int, night: Any, left_by: LEFT, data: Path, tmp_path: Path
) -> None:
    run, blue = tmp_path / "run", data.with_name("images") / "blue.png"
    flags = {"train": data, "eval": data.with_name("eval.jsonl")}
    calm = night.undisturbed(**flags)
    mischief = [["when", STEP, [5], "remove", blue], ["put", "phi3v.packing.loader:Reading.retry_pause_s", 0.001]]
    status, said = night.run(run, *mischief, num_workers=workers, **flags)
    assert status == 2
    error = said.splitlines()[-1]
    assert f"{blue}: no such image; tried again for " in error
    assert error.startswith((f"error: {data}:", "error: train.jsonl:"))
    blue.write_bytes((night.data.with_name("images") / "blue.png").read_bytes())
    status, said = night.run(run, num_workers=workers, resume="auto", **flags)
    assert status == 0, said
    assert left_by(run) == left_by(calm)


def test_what_cannot_be_read_is_skipped_listed_and_counted(
    night: Any, left_by: LEFT, data: Path, tmp_path: Path
) -> None:
    """Also when the run is killed meanwhile, and goes on while the image is still unreadable."""
    blue = data.with_name("images") / "blue.png"
    flags = {"train": data, "eval": data.with_name("eval.jsonl"), "on_bad_example": "skip"}
    cut = ["when", STEP, [5], "cut", blue]
    status, said = night.run(tmp_path / "whole", cut, **flags)
    assert status == 0, said
    skipped = [entry for entry in _log(tmp_path / "whole") if entry["kind"] == "skip"]
    asked = {number for number, line in enumerate(data.read_text().splitlines(), start=1) if "blue.png" in line}
    assert {int(entry["where"].rpartition(":")[2]) for entry in skipped} == asked
    assert all(5 <= entry["step"] <= 10 for entry in skipped)
    assert f"{len(skipped)} times an example was skipped" in said
    blue.write_bytes((night.data.with_name("images") / "blue.png").read_bytes())
    death = ["when", STEP, [8], "die"]
    assert night.run(tmp_path / "killed", cut, death, **flags)[0] == -9
    status, said = night.run(tmp_path / "killed", resume="auto", **flags)
    assert status == 0, said
    assert left_by(tmp_path / "killed") == left_by(tmp_path / "whole")


def test_a_run_that_stopped_at_an_image_goes_on_without_it(night: Any, data: Path, tmp_path: Path) -> None:
    run, blue = tmp_path / "run", data.with_name("images") / "blue.png"
    flags = {"train": data, "eval": data.with_name("eval.jsonl")}
    assert night.run(run, ["when", STEP, [5], "cut", blue], **flags)[0] == 2
    status, said = night.run(run, resume="auto", on_bad_example="skip", **flags)
    assert status == 0, said
    assert [entry["step"] for entry in _log(run) if entry["kind"] == "step"] == [*range(1, 11)]


def test_an_image_that_has_changed_ends_the_run_and_does_not_change_its_steps(
    night: Any, data: Path, tmp_path: Path
) -> None:
    run, blue = tmp_path / "run", data.with_name("images") / "blue.png"
    flags = {"train": data, "eval": data.with_name("eval.jsonl"), "num_crops": 4}
    assert night.run(run, ["when", STEP, [5], "die"], **flags)[0] == -9
    Image.new("RGB", (400, 100)).save(blue)
    status, said = night.run(run, resume="auto", **flags)
    assert status == 2
    assert f"--resume: 1 image changed since the run began, such as {blue}" in said.splitlines()[-1]
    sizes = {name: entry[:2] for name, entry in json.loads((run / "images.json").read_text()).items()}
    (run / "images.json").write_text(json.dumps(sizes))  # as an earlier version wrote it
    status, said = night.run(run, resume="auto", **flags)
    assert status == 2
    assert f"{blue}: now (336, 1344) pixels padded, it was (672, 672) when the data was read" in said.splitlines()[-1]


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
