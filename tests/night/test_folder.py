"""Whose folder it is, among processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder
from phi3v.train.loop import train

LEFT = Callable[[Path], dict[str, Any]]
STEP = "phi3v.train.engines.replicated:Replicated.step"


def test_a_second_writer_is_kept_out_and_a_dead_one_is_not(night: Any, left_by: LEFT, tmp_path: Path) -> None:
    """The dead one has left a worker behind that is still busy, and holds what it inherited."""
    run = tmp_path / "run"
    busy = ["when", "phi3v.packing.loader:make_pack", [2], "sleep", 120.0]
    going = night.start(run, ["when", STEP, [1], "signal", signal.SIGSTOP], busy, num_workers=2, eval_before=False)
    while Path(f"/proc/{going.process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.05)
    ours = RunFolder(run).config
    ours = replace(ours, keeping=replace(ours.keeping, resume="auto"))
    with pytest.raises(InputError, match=rf"another run is writing here \(process {going.process} on "):
        train(ours)
    (worker, *_) = Path(f"/proc/{going.process}/task/{going.process}/children").read_text().split()
    os.kill(going.process, signal.SIGKILL)
    assert going.wait() == -9
    assert Path(f"/proc/{worker}").exists()
    status, said = night.run(run, resume="auto", eval_before=False)
    assert status == 0, said
    calm = left_by(night.undisturbed(eval_before=False))
    assert left_by(run) == calm
    status, said = night.run(run, resume="auto", eval_before=False)
    assert status == 0
    assert f"{run} holds this run, finished: nothing is left to do" in said
    assert left_by(run) == calm
    status, said = night.run(run, eval_before=False)
    assert (status, said) == (2, f"error: --out {run} holds a finished run: choose another folder\n")


def test_two_runs_that_begin_at_once(night: Any, tmp_path: Path) -> None:
    """The other one has begun while this one was still loading its model."""
    run, calm = tmp_path / "run", night.undisturbed()
    other = ["when", "phi3v.train.setup:open_folder", [1], "copy", calm, run]
    status, said = night.run(run, other, resume="auto")
    assert (status, said.splitlines()[-1]) == (2, f"error: --out {run}: another run has begun here meanwhile")
    assert (run / "metrics.json").read_bytes() == (calm / "metrics.json").read_bytes()
