"""The log of a run: every step once, complaints kept, nothing lost to a full disk that need not be."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from phi3v.base.console import console, progress_bar, say, speak
from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder
from phi3v.train import runlog
from phi3v.train.runlog import RunLog
from phi3v.train.screen import Screen

ESSENCE = {"loss": 0.5, "learning_rate": 1e-4, "examples_per_s": 3.21, "pages_per_s": 123.4, "tokens_per_s": 4321.0}
ESSENCE |= {"memory_gb": 1.5, "tflops": 0.123, "data_wait": 0.04, "epoch": 0.1, "seconds": 1.0}


def entry(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, **ESSENCE, **values}


def screen(show: bool = False) -> Screen:
    return Screen(console, total_steps=9, saves=9, show=show)


def lines(folder: Path) -> list[tuple[str, int]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line.get("split", line["kind"]), line["step"]) for line in found]


def opened(folder: Path, first_step: int = 0, **how: Any) -> RunLog:
    return RunLog(RunFolder(folder), first_step=first_step, **{"screen": screen(), **how})


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """The folder of a run that evaluated before, ran six steps, the first and the fifth skipped, and ended."""
    with opened(tmp_path) as log:
        log.write({"kind": "eval", "split": "before", "step": 0, "metrics": {}, "seconds": 1.0})
        for step in range(1, 7):
            log.step(entry(step, **({"skipped": True} if step in (1, 5) else {})))
        log.complain(5, "something", ["e1"])
        log.write({"kind": "eval", "split": "during", "step": 6, "metrics": {}, "seconds": 1.0})
        log.write({"kind": "eval", "split": "final", "step": 6, "metrics": {}, "seconds": 1.0})
    return tmp_path


# -- what is written -------------------------------------------------------------------------------------------------


def test_a_line_is_json_with_the_time_and_without_infinities(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.step(entry(1, grad_norm=float("inf"), loss=0.25))
        log.write({"kind": "eval", "step": 1, "metrics": {"auroc": float("nan")}})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    step, evaluation = (
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    )
    assert step.items() >= {"kind": "step", "step": 1, "loss": 0.25, "grad_norm": None}.items()
    assert step["time"] > 1.7e9
    assert evaluation["metrics"] == {"auroc": None}


def test_a_complaint_is_said_and_kept_with_its_examples(told: Path, capsys: pytest.CaptureFixture) -> None:
    kept = [json.loads(line) for line in (told / "log.jsonl").read_text().splitlines()]
    (complaint,) = [line for line in kept if line["kind"] == "complaint"]
    del complaint["time"]
    assert complaint == {"kind": "complaint", "step": 5, "what": "something", "examples": ["e1"]}
    with opened(told) as log:
        log.complain(7, "of [red]markup[/]", ["e[1]", "e2"])
    assert "step 7: of [red]markup[/]; its examples are e[1], e2" in capsys.readouterr().out


class Listener:
    """A tracker that remembers what it is told, until `strength` numbers are too many for it."""

    name, where = "listener", "here"

    def __init__(self, strength: int = 100) -> None:
        self.strength, self.heard = strength, list[Any]()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if len(self.heard) == self.strength:
            raise ConnectionError("no route to [it]\nand more")
        self.heard.append((step, dict(numbers)))

    def finish(self, *, failed: bool) -> None:
        self.heard.append("failed" if failed else "end")


def test_trackers_get_the_numbers_and_are_told_of_the_end(tmp_path: Path) -> None:
    with opened(tmp_path, trackers=[tracker := Listener()]) as log:
        log.step(entry(1, skipped=True))
        log.complain(1, "no number")
        log.write({"kind": "eval", "split": "final", "step": 1, "metrics": {"accuracy": 0.5}, "seconds": 2.0})
    evaluation = {"eval/accuracy": 0.5, "seconds": 2.0}
    assert tracker.heard == [(1, {**ESSENCE, "skipped": 1.0}), (1, evaluation), "end"]


def test_trackers_are_told_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(InputError), opened(tmp_path, trackers=[tracker := Listener()]):
        raise InputError("out of memory")
    assert tracker.heard == ["failed"]


def test_a_tracker_that_fails_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trackers = [weak := Listener(strength=1), strong := Listener()]
    with opened(tmp_path, trackers=trackers) as log:
        for step in range(1, 4):
            log.step(entry(step))
    assert [len(tracker.heard) for tracker in (weak, strong)] == [1, 4]
    assert lines(tmp_path) == [("step", 1), ("step", 2), ("complaint", 2), ("step", 3)]
    said = capsys.readouterr().out
    assert said == "step 2: --track listener fails and is left out: no route to [it]\n"


def test_a_rank_that_does_not_write_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunLog(None, first_step=0, screen=screen()) as log:
        log.step(entry(1, skipped=True))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# -- what is forgotten -----------------------------------------------------------------------------------------------


ALL = [("before", 0), *(("step", step) for step in range(1, 7)), ("complaint", 5), ("during", 6), ("final", 6)]


@pytest.mark.parametrize(
    ("first_step", "kept"),
    [
        (0, [("complaint", 5)]),
        (4, [*ALL[:5], ("complaint", 5)]),
        (6, ALL[:-1]),
    ],
    ids=["from the start", "from a checkpoint", "from the last one"],
)
def test_a_run_that_goes_on_says_nothing_twice(first_step: int, kept: list[Any], told: Path) -> None:
    assert lines(told) == ALL
    with opened(told, first_step):
        assert lines(told) == kept


def test_half_a_line_of_a_run_that_was_killed_goes(told: Path) -> None:
    with (told / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    with opened(told, 6) as log:
        log.step(entry(7))
    assert lines(told) == [*ALL[:-1], ("step", 7)]


@pytest.mark.parametrize(("first_step", "skipped"), [(0, 0), (4, 1), (6, 2)])
def test_skipped_steps_are_counted_over_all_sittings(first_step: int, skipped: int, told: Path) -> None:
    with opened(told, first_step) as log:
        assert log.screen.skipped == skipped
        log.step(entry(first_step + 1, skipped=True))
        assert log.screen.skipped == skipped + 1


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk with `room` bytes left for the log: what does not fit is cut off, and refused."""
    disk, real = {"room": 10**9}, open

    class Stream:
        def __init__(self, file: Path) -> None:
            self.file, self.held = real(file, "a"), ""

        def write(self, text: str) -> None:
            self.held += text

        def fileno(self) -> int:
            return self.file.fileno()

        def flush(self) -> None:
            fits, self.held = self.held[: disk["room"]], self.held[disk["room"] :]
            disk["room"] -= len(fits)
            self.file.write(fits)
            self.file.flush()
            if self.held:
                raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            try:
                self.flush()
            finally:
                self.file.close()

    monkeypatch.setattr(runlog, "open", lambda file, mode: Stream(file), raising=False)
    return disk


def test_a_full_disk_ends_the_run(disk: dict[str, int], tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.step(entry(1))
        disk["room"] = 20
        with pytest.raises(InputError, match=r"cannot write .*log\.jsonl: \[Errno 28\] No space left on device"):
            log.step(entry(2))


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_a_process_that_is_not_to_speak_says_nothing(capsys: pytest.CaptureFixture) -> None:
    speak(False)
    try:
        say("not heard")
        with progress_bar("nor", 3, "of this") as advance:
            advance(3)
    finally:
        speak(True)
    say("heard")
    assert capsys.readouterr().out == "heard\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    return lambda seconds: now.append(now.pop() + seconds)


def test_long_work_says_how_long_it_took(clock: Callable[[float], None], capsys: pytest.CaptureFixture) -> None:
    for summary in (True, False):
        with progress_bar("counting", 1200, "sheep", summary=summary) as advance:
            clock(61)
            advance(1200)
    assert capsys.readouterr().out == "counting: 1,200 sheep in 61 s\n"
