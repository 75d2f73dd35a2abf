"""A run can be stopped: after the step it is in, with a checkpoint, and it goes on as if it never had been."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v.base import stopping
from phi3v.base.config import Run
from phi3v.base.stopping import StopRequest
from phi3v.cli import main
from phi3v.train import scoring
from phi3v.train.loop import train
from phi3v.train.runlog import RunLog

MAKE = Callable[..., Run]
LOG = Callable[..., list[dict[str, Any]]]


# -- the request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_then_means_what_it_meant_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == f"{number.name} was received"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_is_obeyed_at_once_but_one_press_may_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        now += stopping.SAME_PRESS_S / 2
        signal.raise_signal(signal.SIGINT)  # torchrun's, of the same press
        now += stopping.SAME_PRESS_S
        signal.raise_signal(signal.SIGTERM)  # a machine that is taken away asks for the same
        assert stop.reason == "SIGINT was received"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    stop = StopRequest(max_minutes=2)
    now += 119
    assert stop.reason is None
    now += 1
    assert stop.reason == "the time of --max-minutes is up"


def test_a_thread_can_train_but_not_catch_signals() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest() as stop:
            found.append((stop.reason, signal.getsignal(signal.SIGTERM)))

    (thread := threading.Thread(target=work)).start()
    thread.join()
    assert found == [(None, before)]


# -- the run ---------------------------------------------------------------------------------------------------------


def model_of(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def test_a_run_in_many_sittings_is_one_run(
    settings_for: MAKE, changed_model: Callable[..., Path], tmp_path: Path, log_of: LOG, capsys: pytest.CaptureFixture
) -> None:
    """A step each, as the time is always up; the same settings begin it, go on with it, and find it finished."""
    flags = {"model": changed_model({"resid_pdrop": 0.2}), "max_steps": 4}
    train(settings_for(out=tmp_path / "whole", **flags))
    run = settings_for(out=tmp_path / "run", resume="auto", max_minutes=1e-9, **flags)
    for sitting in (1, 2, 3):
        capsys.readouterr()
        assert train(run) == {}
        assert [entry["step"] for entry in log_of(tmp_path / "run")] == list(range(1, sitting + 1))
        said = capsys.readouterr().out
        assert f"stopped after step {sitting}, which is saved: the time of --max-minutes is up" in said
        assert not (tmp_path / "run" / "final").exists()
    result = train(run)
    assert result == {"step": 4, "before": None, "final": None, "baselines": None}
    assert model_of(tmp_path / "run") == model_of(tmp_path / "whole")
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == losses[1]
    capsys.readouterr()
    assert train(run) == result
    assert "holds this run, finished: nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["before", "during", "last", "final"])
def test_a_run_stops_in_an_evaluation_without_waiting_for_its_end(
    split: str, settings_for: MAKE, tiny_data: Path, log_of: LOG, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packs of questions: the request comes before the second one. Resumed, all is as if it had not come."""
    flags = {"max_steps": 2, "eval": tiny_data, "eval_every_steps": 1, "max_tokens_per_pack": 700}
    at, steps = {"before": (1, []), "during": (2, [1]), "last": (3, [1, 2]), "final": (4, [1, 2])}[split]
    real, titles = scoring.predict, []

    def predict(*given: Any, **named: Any) -> Any:
        titles.append(named["title"])
        asked = iter([False, True])
        leave_off = (lambda: next(asked)) if len(titles) == at else lambda: False
        return real(*given, **{**named, "leave_off": leave_off})

    monkeypatch.setattr(scoring, "predict", predict)
    run = settings_for(resume="auto", **flags)
    assert train(run) == {}
    assert not (run.keeping.out / "metrics.json").exists()
    saved = sorted(path.name for path in (run.keeping.out / "checkpoints").glob("*"))
    assert saved == [f"step-{step:06d}" for step in steps]
    result = train(run)
    assert result["final"]["questions"] == 15
    expected = [("before", 0), ("during", 1), ("during", 2), ("final", result["step"])]
    assert [(entry["split"], entry["step"]) for entry in log_of(run.keeping.out, "eval")] == expected
    assert [entry["step"] for entry in log_of(run.keeping.out)] == [1, 2]


# -- a process -------------------------------------------------------------------------------------------------------


def flags_of(model: Path, data: Path, out: Path) -> list[str]:
    flags = {"model": model, "train": data, "out": out, "batch-size": 4, "dtype": "fp32", "num-workers": 0}
    return ["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def test_sigterm_ends_a_process_after_its_step_and_it_says_how_to_go_on(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """As a spot machine's end does. A second process that wants to go on meanwhile is kept out."""
    out = tmp_path / "a run"
    given = [*flags_of(tiny_model_dir, tiny_data, out), "--max-steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command, pipe = [sys.executable, "-m", "phi3v", *given], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            while process.poll() is None and not (out / "log.jsonl").exists():
                time.sleep(0.02)
            assert main([*given, "--resume", "auto"]) == 2
            assert f"another run is writing here (process {process.pid} on " in capfd.readouterr().err
            process.send_signal(signal.SIGTERM)
            said, complained = process.communicate()
        finally:
            process.kill()
    assert (process.returncode, complained) == (0, "")
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{steps[-1]:06d}"]
    where = f"stopped after step {steps[-1]}, which is saved: SIGTERM was received"
    assert said.splitlines()[-1] == f"{where}. The same command with --resume auto continues"


def test_a_second_ctrl_c_ends_a_process_in_the_middle_of_a_step(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    given = flags_of(tiny_model_dir, tiny_data, tmp_path / "run")

    def run() -> None:
        """In a process of its own, of which a step takes ten minutes."""
        sys.stdout = sys.stderr = (tmp_path / "said").open("w")
        stopping.SAME_PRESS_S = 0.1
        log_step = RunLog.step
        RunLog.step = lambda log, entry: (log_step(log, entry), time.sleep(600))  # type: ignore[assignment,func-returns-value,method-assign]
        sys.exit(main(given))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        while process.is_alive() and not (tmp_path / "run" / "log.jsonl").exists():
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(0.5)
        assert process.is_alive(), "the first one waits for the step"
        os.kill(process.pid or 0, signal.SIGINT)
        process.join()
    finally:
        process.kill()
    assert process.exitcode == 130
    assert (tmp_path / "said").read_text().endswith("\ninterrupted\n")
    assert not (tmp_path / "run" / "checkpoints").exists()
