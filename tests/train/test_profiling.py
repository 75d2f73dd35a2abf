"""`--profile-steps`: a trace of the steps that were asked for, or a refusal before anything is loaded."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.train import setup
from phi3v.train.loop import train
from phi3v.train.profiling import parse_steps

MAKE = Callable[..., Run]


def test_first_and_last_are_included() -> None:
    assert list(parse_steps("10:13")) == [10, 11, 12, 13]
    assert list(parse_steps("2:2")) == [2]
    assert not parse_steps(None)


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "3:2", "0:2", "-1:2", "a:b", "1:2:3", "1.0:2"])
def test_what_is_no_range_of_steps_is_refused_by_its_flag(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--profile-steps {text}: must be FIRST:LAST, such as 10:13")):
        parse_steps(text)


@pytest.mark.parametrize("flags", [{}, {"dry_run": True}])
@pytest.mark.parametrize(("steps", "message"), [("3:2", "must be FIRST:LAST"), ("3:5", "the run has 4 steps")])
def test_a_run_is_refused_before_its_model_is_loaded(
    steps: str, message: str, flags: dict, settings_for: MAKE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*unused: Any, **more: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(setup, "build_model", loaded)
    with pytest.raises(InputError, match=f"--profile-steps {steps}: {message}"):
        train(settings_for(profile_steps=steps, max_steps=4, **flags))
    assert list(tmp_path.iterdir()) == []


def traced(file: Path) -> set[str]:
    """The steps in a trace."""
    with gzip.open(file) as stream:
        events = json.load(stream)["traceEvents"]
    assert any("addmm" in event.get("name", "") for event in events), "operators of PyTorch"
    return {event["name"] for event in events if re.fullmatch(r"step \d+", event.get("name", ""))}


def test_a_trace_holds_the_steps_and_the_run_says_where_it_is(settings_for: MAKE, capsys: Any) -> None:
    train(run := settings_for(profile_steps="2:3", max_steps=4))
    (file,) = (run.keeping.out / "profile").iterdir()
    assert file.name == "steps-2-3.rank-0.json.gz"
    assert traced(file) == {"step 2", "step 3"}
    assert f"profile     {file}" in capsys.readouterr().out


def test_a_run_in_two_sittings_has_two_traces(settings_for: MAKE) -> None:
    run = settings_for(profile_steps="1:3", max_steps=4, resume="auto", max_minutes=1e-9)
    assert train(run) == {}  # after a step
    train(settings_for(profile_steps="1:3", max_steps=4, resume="auto"))
    files = sorted((run.keeping.out / "profile").iterdir())
    assert [file.name for file in files] == ["steps-1-1.rank-0.json.gz", "steps-2-3.rank-0.json.gz"]
    assert [traced(file) for file in files] == [{"step 1"}, {"step 2", "step 3"}]
