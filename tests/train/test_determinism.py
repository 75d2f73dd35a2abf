"""`--deterministic` for the time of a run: the modes are set, and the process is as before when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.train.determinism import WORKSPACE, deterministic
from phi3v.train.loop import train
from phi3v.train.runlog import RunLog

MAKE = Callable[..., Run]


def modes() -> tuple[Any, ...]:
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return enabled, warns, torch.backends.cudnn.benchmark, os.environ.get(WORKSPACE)


@pytest.fixture(autouse=True)
def _modes_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Others than the defaults, so that putting back differs from switching off."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def test_the_modes_are_set_and_put_back_also_after_an_error() -> None:
    before = modes()

    @deterministic(True)
    def work() -> None:
        assert modes() == (True, False, False, ":4096:8")
        torch.ones(2, 2).put_(torch.tensor([0]), torch.ones(1))  # has no deterministic form

    with pytest.raises(RuntimeError, match="deterministic"):
        work()
    assert modes() == before
    with deterministic(False):
        assert modes() == before


def test_a_deterministic_workspace_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(True):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"


def test_a_run_is_deterministic_while_it_trains_and_the_same_on_a_cpu(
    settings_for: MAKE, tiny_data: Path, tmp_path: Path, log_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, before, step = [], modes(), RunLog.step

    def watched(log: RunLog, entry: dict[str, Any]) -> None:
        seen.append(modes())
        step(log, entry)

    monkeypatch.setattr(RunLog, "step", watched)
    losses = []
    for wanted in (True, False):
        seen.clear()
        out = tmp_path / str(wanted)
        train(settings_for(deterministic=wanted, out=out, max_steps=3, eval=tiny_data, eval_limit=2))
        assert set(seen) == {(True, False, False, ":4096:8") if wanted else before}
        assert modes() == before
        losses.append([(entry["loss"], entry["grad_norm"]) for entry in log_of(out)])
    assert losses[0] == losses[1]


def test_a_refused_run_leaves_the_modes_too(settings_for: MAKE) -> None:
    before = modes()
    with pytest.raises(InputError):
        train(settings_for(deterministic=True, train=Path("nowhere.jsonl")))
    assert modes() == before
