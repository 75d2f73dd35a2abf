"""kill -9, wherever a run happens to be: `--resume auto` ends as if nothing had been.

As if nothing had been: the same files, all checkpoints among them, with the same bytes; every step, every evaluation
once in the log, in order, with the same numbers; the same predictions and scores; and no rubbish.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLED = -9
LEFT = Callable[[Path], dict[str, Any]]


def test_one_run_killed_again_and_again(night: Any, left_by: LEFT, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = lambda line: ["changes", run, tmp_path / "changes", line]  # noqa: E731
    for mischief in (
        changes("rename config.json"),
        changes("rename environment.json"),
        ["when", "phi3v.infer.answering:generate_pack", [1], "die"],
        ["half_a_line", 2],
        ["half_written", 1],
        ["when", "phi3v.train.engines.replicated:Replicated.step", [6], "die"],
        changes("rename checkpoints/step-000006"),
        changes("remove checkpoints/step-000003/state.json"),
        changes("rename final"),
        changes("rename predictions.jsonl"),
        changes("rename metrics.json"),
        changes("rename report.html"),
    ):
        status, said = night.run(run, mischief, resume="auto")
        assert status == KILLED, f"{mischief}: {said}"
    status, said = night.run(run, resume="auto")
    assert status == 0, said
    assert left_by(run) == left_by(night.undisturbed())


@pytest.mark.slow
def test_killed_before_every_change_of_its_folder(night: Any, left_by: LEFT, tmp_path: Path) -> None:
    changes = night.changes()
    assert len(changes) > 50
    assert len(set(changes)) == len(changes)
    for number, change in enumerate(changes):
        run = tmp_path / str(number)
        status, said = night.run(run, ["changes", run, tmp_path / "changes", change])
        assert status == KILLED, f"{change}: {said}"
        status, said = night.run(run, resume="auto")
        assert status == 0, f"{change}: {said}"
        assert left_by(run) == left_by(night.undisturbed()), change
    print(f"{len(changes)} kills survived, one before every change of the run folder")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", range(5))
def test_killed_five_times_at_random(seed: int, workers: int, night: Any, left_by: LEFT, tmp_path: Path) -> None:
    """The moments are counted in time of the processor, so that they do not depend on how busy the machine is."""
    chance, record, places = random.Random(seed), tmp_path / "places", Counter[str]()
    slow = [["slow", "phi3v.train.checkpoint:save_file", 0.05], ["slow", "phi3v.base.files:flush", 0.02]]
    runs = iter(range(100))
    run = tmp_path / str(next(runs))
    while places.total() < 5:
        record.write_text("")
        going = night.start(run, ["places", record], *slow, resume="auto", num_workers=workers)
        moment = chance.uniform(1.0, 4.0)
        while (used := going.seconds()) is not None and used < moment:
            time.sleep(0.002)
        if used is not None:
            os.kill(going.process, signal.SIGKILL)
        status = going.wait()
        assert status in (0, KILLED), going.said
        if status == KILLED:
            places[_place(record)] += 1
        else:
            assert left_by(run) == left_by(night.undisturbed())
            run = tmp_path / str(next(runs))
    status, said = night.run(run, resume="auto", num_workers=workers)
    assert status == 0, said
    assert left_by(run) == left_by(night.undisturbed())
    print(f"seed {seed}, {workers} workers: kills survived in {dict(places)}")


def _place(record: Path) -> str:
    """The innermost place that was entered and not left."""
    inside = ["starting"]
    for line in record.read_text().splitlines():
        way, place = line[0], line[2:]
        if way == ">":
            inside.append(place)
        else:
            assert inside.pop() == place
    return inside[-1]
