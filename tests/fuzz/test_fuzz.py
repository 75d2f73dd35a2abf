"""Hostile variations of every kind of file we read: a few thousand by hypothesis, as many as time allows by atheris."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import mutated_bytes, mutated_json
from targets import TARGETS

HERE = Path(__file__).parent
SLOW = {"config", "weights", "index", "adapter_config", "adapter_weights"}  # a model is loaded
SLOW |= {"log", "metrics", "environment in a report", "lengths", "predictions"}  # a page is made
SECONDS = int(os.environ.get("PHI3V_FUZZ_SECONDS", "600"))
"""Of all targets of atheris together."""


@st.composite
def hostile(draw: Callable, honest: list[bytes]) -> bytes:
    """An honest content, values of its JSON or bytes of it changed."""
    content, random = draw(st.sampled_from(honest)), draw(st.randoms(use_true_random=False))
    return draw(st.sampled_from((mutated_json, mutated_bytes)))(content, random)


@pytest.mark.parametrize("name", TARGETS)
def test_honest_files_pass(name: str, place: Path) -> None:
    target = TARGETS[name]
    for content in target.honest(place):
        target(place, content)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_files_are_refused_in_one_line(name: str, place: Path) -> None:
    target = TARGETS[name]

    # Not random: what fails here has been seen before. New things are looked for by test_explore.
    @settings(max_examples=10 if name in SLOW else 50, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(hostile(target.honest(place)))
    def tried(content: bytes) -> None:
        target(place, content)

    tried()


def test_pictures_cut_off_anywhere(place: Path) -> None:
    target = TARGETS["image"]
    for content in target.honest(place):
        for end in range(0, len(content), 1 + len(content) // 20):
            target(place, content[:end])


@pytest.mark.slow
def test_pictures_cut_off_everywhere_and_with_every_bit_flipped(place: Path) -> None:
    target = TARGETS["image"]
    for content in target.honest(place):
        for position in range(len(content)):
            target(place, content[:position])
            flipped = content[position] ^ (1 << position % 8)
            target(place, content[:position] + bytes([flipped]) + content[position + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_explore(name: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Guided by coverage, from the honest files on; crashes stay in the test's folder, with their inputs."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install 'phi3v[fuzz]'")
    shutil.copytree(place, tmp_path / "place")
    command = [sys.executable, HERE / "explore.py", name, tmp_path / "place", tmp_path, max(1, SECONDS // len(TARGETS))]
    ended = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    counts = json.loads((tmp_path / "result.json").read_text())
    crashes = sorted(file for file in (tmp_path / "crashes").iterdir())
    with capfd.disabled():
        print(f"\nfuzz: {name} {counts['inputs']:,} inputs, {counts['crashes'] + (ended.returncode != 0)} crashes")
    told = [file.read_text() for file in crashes if file.suffix == ".txt"]
    assert not crashes, "\n".join([*told, ended.stderr[-3000:], *map(str, crashes)])
    assert ended.returncode == 0, ended.stderr[-3000:]
