"""Losses and gradients that are not numbers, and losses that leap."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LOSS = "phi3v.packing.loss:weighted_cross_entropy"  # called once a step: every step here is one pack
LOG = Callable[[Path], list[dict[str, Any]]]
NAN, ROLLBACK = math.nan, {"on_nonfinite": "rollback", "eval_every_steps": 1000}


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_run_that_stopped_at_a_nan_goes_on_past_it(night: Any, tmp_path: Path) -> None:
    run, nan = tmp_path / "run", ["spoil", LOSS, [5], NAN]
    status, said = night.run(run, nan)
    assert status == 2
    message = "error: step 5: the loss is not finite; its examples are "
    assert said.splitlines()[-1].startswith(message)
    names = said.splitlines()[-1].removeprefix(message).split(", ")
    assert len(names) == 4
    # Resumed after step 4: its first step is the one.
    status, said = night.run(run, ["spoil", LOSS, [1], NAN], resume="auto", on_nonfinite="rollback")
    assert status == 0, said
    assert [line["step"] for line in lines_of(run, "step")] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    (complaint,) = lines_of(run, "complaint")
    assert complaint["what"] == "the loss is not finite: back to step 4, and later past this one"
    assert (complaint["step"], set(complaint["examples"])) == (5, set(names))


@pytest.mark.parametrize(("calls", "back", "gone"), [([2], 0, [2]), ([5, 8], 3, [5, 7]), ([10], 9, [10])])
def test_a_run_goes_back_and_past(calls: list[int], back: int, gone: list[int], night: Any, tmp_path: Path) -> None:
    """By calls of the loss: after the fifth was not finite, the sixth is of step 4 again, and the eighth of step 7."""
    run = tmp_path / "run"
    status, said = night.run(run, ["spoil", LOSS, calls, NAN], **ROLLBACK)
    assert status == 0, said
    assert f"step {gone[0]}: the loss is not finite: back to step {back}, and later past this one" in said
    assert [line["step"] for line in lines_of(run, "step")] == [s for s in range(1, 11) if s not in gone]
    assert [line["split"] for line in lines_of(run, "eval")] == ["before", "final"]
    assert [line["step"] for line in lines_of(run, "complaint")] == gone
    assert json.loads((run / "metrics.json").read_text())["before"] is not None
    assert [path.name[-2:] for path in sorted((run / "checkpoints").iterdir())] == ["09", "10"]


def test_more_than_ten_times_end_the_run(night: Any, tmp_path: Path) -> None:
    """Every step from the second on is bad: eleven of them are too many."""
    status, said = night.run(tmp_path / "run", ["spoil", LOSS, list(range(2, 100)), NAN], **ROLLBACK, max_steps=20)
    assert status == 2
    assert said.count("the loss is not finite: back to step ") == 10
    assert "the loss is not finite; its examples are " in said.splitlines()[-1]


def test_a_loss_that_leaps_is_reported(night: Any, tmp_path: Path) -> None:
    flags = {"max_steps": 60, "save_every_steps": 1000, "eval_every_steps": 1000}
    status, said = night.run(tmp_path / "run", ["spoil", LOSS, [57], 30.0], **flags)
    assert status == 0, said
    (complaint,) = lines_of(tmp_path / "run", "complaint")
    assert complaint["step"] == 57
    assert "(median of 50 steps)" in complaint["what"]
    assert f"step 57: {complaint['what']}; its examples are {', '.join(complaint['examples'])}" in said
