"""Losses and gradients that are not numbers, and losses that leap."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOSS = "phi3v.packing.loss:weighted_cross_entropy"
"""Called for the evaluations before training and after step 4, and once a step: every step here is one pack."""
LEFT = Callable[[Path], dict[str, Any]]


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_run_that_stopped_at_a_nan_names_its_examples_and_resumes(night: Any, left_by: LEFT, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, said = night.run(run, ["spoil", LOSS, [7], math.nan])
    assert status == 2
    message = "error: step 5: the loss is not finite; its examples are "
    assert said.splitlines()[-1].startswith(message)
    assert len(said.splitlines()[-1].removeprefix(message).split(", ")) == 4
    status, said = night.run(run, resume="auto")
    assert status == 0, said
    assert left_by(run) == left_by(night.undisturbed())


def test_a_loss_that_leaps_is_reported(night: Any, tmp_path: Path) -> None:
    flags = {"max_steps": 60, "save_every_steps": 1000, "eval_every_steps": 1000}
    status, said = night.run(tmp_path / "run", ["spoil", LOSS, [58], 30.0], **flags)
    assert status == 0, said
    (complaint,) = lines_of(tmp_path / "run", "complaint")
    assert complaint["step"] == 57
    assert "(median of 50 steps)" in complaint["what"]
    assert f"step 57: {complaint['what']}; its examples are {', '.join(complaint['examples'])}" in said
