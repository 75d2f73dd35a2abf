"""SIGTERM (a spot machine is taken away), Ctrl-C, and time that is up: the run ends well, saved, with status 0.

What it prints goes on with it, and in the end it is the run that was never stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LEFT = Callable[[Path], dict[str, Any]]
SMALL_PACKS = {"max_tokens_per_pack": 400}  # several in an evaluation, which is left off between two


def test_a_run_stopped_again_and_again(night: Any, left_by: LEFT, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for target, number, where in (
        ("phi3v.infer.answering:generate_pack", signal.SIGTERM, "before the first step"),
        ("phi3v.train.engines.replicated:Replicated.learn", signal.SIGINT, "after step 1, which is saved"),
        ("phi3v.train.checkpoint:save_file", signal.SIGTERM, "after step 4, which is saved"),
        ("phi3v.infer.answering:generate_pack", signal.SIGINT, "after step 4, which is saved"),
        ("phi3v.infer.answering:generate_pack", signal.SIGTERM, "after step 4, which is saved"),
        ("phi3v.train.engines.replicated:Replicated.step", signal.SIGTERM, "after step 5, which is saved"),
        ("phi3v.train.loop:save_model", signal.SIGTERM, "after step 10, which is saved"),
        ("phi3v.infer.answering:generate_pack", signal.SIGINT, "after step 10, which is saved"),
    ):
        mischief = ["when", target, [1], "signal", number]
        status, said = night.run(run, mischief, resume="auto", **SMALL_PACKS)
        assert status == 0, said
        assert f"stopped {where}: {number.name} was received. The same command" in said
    status, said = night.run(run, resume="auto", **SMALL_PACKS)
    assert status == 0, said
    assert left_by(run) == left_by(night.undisturbed(**SMALL_PACKS))


def test_a_second_ctrl_c_stops_at_once(night: Any, left_by: LEFT, tmp_path: Path) -> None:
    press = ["when", "phi3v.train.engines.replicated:Replicated.step", [5], "signal", signal.SIGINT]
    status, said = night.run(tmp_path / "run", press, press, ["put", "phi3v.base.stopping:SAME_PRESS_S", -1])
    assert (status, said.splitlines()[-1]) == (130, "interrupted")
    assert night.run(tmp_path / "run", resume="auto")[0] == 0
    assert left_by(tmp_path / "run") == left_by(night.undisturbed())


def test_a_run_has_its_minutes(night: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        status, said = night.run(tmp_path / "run", max_minutes=1e-6, eval_before=False, resume="auto")
        assert status == 0
        assert f"stopped after step {step}, which is saved: the time of --max-minutes is up. The same command" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_job_as_it_is_typed(number: signal.Signals, night: Any, left_by: LEFT, tmp_path: Path) -> None:
    """A process of its own, and the signal goes to its workers too, as from a terminal or a scheduler."""
    flags = {"max_steps": 200, "save_every_steps": 1000, "eval_every_steps": 1000}
    typed = [sys.executable, "-m", "phi3v", *night.arguments(tmp_path / "run", num_workers=2, **flags)]
    with subprocess.Popen(typed, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        log = tmp_path / "run/log.jsonl"
        while not log.exists() or log.read_text().count("\n") < 5:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    subprocess.run([*typed, "--resume", "auto"], check=True, stdout=subprocess.DEVNULL)
    stopped, _ = sorted((tmp_path / "run/checkpoints").iterdir())
    shutil.rmtree(stopped)  # one more than an undisturbed run has
    assert left_by(tmp_path / "run") == left_by(night.undisturbed(**flags))
