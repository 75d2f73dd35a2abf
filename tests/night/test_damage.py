"""Damaged checkpoints in the folder of a run: the damage is named, and the newest whole one is used."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LEFT = Callable[[Path], dict[str, Any]]
WEIGHTS = "rank-00000-of-00001.safetensors"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="session")
def killed(night: Any) -> Path:
    """The folder of a run that was killed in step 9, with checkpoints of steps 4, 6 and 8. Not to be changed."""
    run = night.folder / "killed"
    death = ["when", "phi3v.train.engines.replicated:Replicated.step", [9], "die"]
    assert night.run(run, death, keep_checkpoints=3)[0] == -9
    assert [path.name[-1] for path in sorted((run / "checkpoints").iterdir())] == ["4", "6", "8"]
    return run


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (cut, WEIGHTS, " is damaged: its size or SHA-256 is not that of the file that was written"),
        (flip, WEIGHTS, " is damaged: its size or SHA-256 is not that of the file that was written"),
        (flip, "state.json", " is damaged: its size or SHA-256 is not that of the file that was written"),
        (Path.unlink, "state.json", ": No such file or directory"),
        (Path.unlink, "manifest.json", ": No such file or directory"),
        (cut, "manifest.json", ": not JSON"),
    ],
    ids=["short", "a bit", "a bit of the state", "no state", "no manifest", "half a manifest"],
)
def test_the_damage_is_named(damage: Any, name: str, said: str, night: Any, killed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    newest, before = run / "checkpoints/step-000008", run / "checkpoints/step-000006"
    damage(newest / name)
    status, lines = night.run(run, ["when", "phi3v.train.loop:learn", [1], "die"], resume="auto")
    assert status == -9, lines
    assert re.search(f"damaged checkpoint passed over: {newest / name}{said}", lines)
    assert f"resuming from {before}\n" in lines


def test_the_newest_whole_one_is_used_and_the_damaged_ones_make_room(
    night: Any, left_by: LEFT, killed: Path, tmp_path: Path
) -> None:
    """No damaged checkpoint is kept. Bytes that the disk does not give back are damage, too."""
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    flip(run / "checkpoints/step-000006" / WEIGHTS)
    broken = ["when", "phi3v.train.checkpoint:checksum", [1], "fail"]
    death = ["when", "phi3v.train.checkpoint:save_file", [2], "die"]  # step 6 has been saved anew
    status, said = night.run(run, broken, death, resume="auto", keep_checkpoints=1)
    assert status == -9, said
    assert f"passed over: {run}/checkpoints/step-000008/{WEIGHTS}: Input/output error" in said
    assert f"passed over: {run}/checkpoints/step-000006/{WEIGHTS} is damaged" in said
    assert f"resuming from {run}/checkpoints/step-000004" in said
    left = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert left == ["step-000004", "step-000006"]  # the best and the newest
    status, said = night.run(run, resume="auto")
    assert f"resuming from {run}/checkpoints/step-000006" in said
    assert left_by(run) == left_by(night.undisturbed())


def test_without_a_whole_one_the_run_starts_again_and_says_so(
    night: Any, left_by: LEFT, killed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    for checkpoint in (run / "checkpoints").iterdir():
        flip(checkpoint / WEIGHTS)
    status, said = night.run(run, resume="auto")
    assert status == 0, said
    assert said.count("damaged checkpoint passed over: ") == 3
    assert f"no whole checkpoint in {run}: starting again at step 0" in said
    assert left_by(run) == left_by(night.undisturbed())
