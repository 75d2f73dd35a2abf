"""Runs with `--vision-cache`: the same numbers, fewer calls of the tower, and what is said and refused beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

import phi3v.train.memory
from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.train.loop import train
from phi3v.train.memory import CacheRoom

MAKE = Callable[..., Run]
LOG = Callable[..., list[dict[str, Any]]]
EPOCH = 4  # steps


def weights(folder: Path) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in load_file(folder / "final" / "model.safetensors").items()}


# -- two epochs ------------------------------------------------------------------------------------------------------


def test_two_epochs_are_those_without_a_cache_and_go_on_with_any(
    settings_for: MAKE, tmp_path: Path, log_of: LOG, tower_calls: list[int], capsys: pytest.CaptureFixture
) -> None:
    """Bit for bit: losses, norms and final weights; and again when the second epoch is done anew, in another way."""

    def did(out: Path, **flags: Any) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        tower_calls.clear()
        chosen = {"freeze": ("vision",), "epochs": 2.0, "save_every_steps": EPOCH, "max_tokens_per_pack": 700}
        train(settings_for(out=out, **{**chosen, **flags}))
        numbers = ("step", "loss", "grad_norm", "crops")
        return [{name: entry[name] for name in numbers} for entry in log_of(out)], weights(out)

    def after_an_epoch(name: str) -> Path:
        shutil.copytree(tmp_path / name, out := tmp_path / f"{name}-again")
        shutil.rmtree(out / "final")
        shutil.rmtree(out / "checkpoints" / f"step-{2 * EPOCH:06d}")
        (out / "metrics.json").unlink()
        return out

    expected = did(tmp_path / "none")
    assert len(tower_calls) > 8, "every page in every epoch"
    assert not any("cached_crops" in entry for entry in log_of(tmp_path / "none"))
    assert " cache " not in capsys.readouterr().out
    for where in ("memory", "disk"):
        assert did(tmp_path / where, vision_cache=where) == expected
        assert tower_calls == [1] * 4, "every picture once"
        entries = log_of(tmp_path / where)
        assert entries[0]["cached_crops"] < entries[0]["crops"]
        assert all(entry["cached_crops"] == entry["crops"] for entry in entries[EPOCH:])
        assert f"cache up to 0.1 MB for 4 pictures, in {where if where == 'memory' else tmp_path}" in " ".join(
            capsys.readouterr().out.split()
        )
    assert len(list((tmp_path / "disk" / "vision-cache").glob("*.safetensors"))) == 4

    out = after_an_epoch("disk")
    assert did(out, vision_cache="disk", resume="auto") == expected
    assert tower_calls == [], "what was kept is found again"
    out = after_an_epoch("memory")
    assert did(out, vision_cache="memory", resume="auto") == expected
    assert tower_calls == [1] * 4
    out = after_an_epoch("none")
    assert did(out, vision_cache="disk", vision_cache_dir=tmp_path / "disk/vision-cache", resume="auto") == expected
    assert tower_calls == [], "several runs may share a folder"


def test_adapters_learn_as_they_do_without(
    settings_for: MAKE, tmp_path: Path, log_of: LOG, tower_calls: list[int]
) -> None:
    losses = []
    for where in ("none", "memory"):
        flags = {"lora": True, "lora_rank": 2, "freeze_vision_model": True, "max_steps": EPOCH + 1}
        train(settings_for(out=tmp_path / where, vision_cache=where, **flags))
        losses.append([(entry["loss"], entry["grad_norm"]) for entry in log_of(tmp_path / where)])
    assert losses[0] == losses[1]


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"vision_cache": "memory"}, "--vision-cache memory needs a frozen vision tower: add --freeze vision"),
        ({"vision_cache": "disk", "lora": True}, "needs a frozen vision tower"),
        ({"vision_cache": "disk", "freeze": ("projector",)}, "needs a frozen vision tower"),
        ({"vision_cache_dir": Path("x")}, "--vision-cache-dir has no effect without --vision-cache disk"),
        (
            {"vision_cache": "memory", "vision_cache_dir": Path("x"), "freeze": ("vision",)},
            "--vision-cache-dir has no effect without --vision-cache disk",
        ),
        (
            {"vision_cache": "memory", "parallel": "zero3", "freeze": ("vision",)},
            "--vision-cache memory cannot go with --parallel zero3: choose zero2 or fsdp2",
        ),
    ],
)
def test_flags_that_cannot_go_together(flags: dict[str, Any], words: str, settings_for: MAKE) -> None:
    with pytest.raises(InputError, match=words):
        settings_for(**flags).check()


class Usage(NamedTuple):
    free: int


def room(folder: Path | None = None, processes: int = 1) -> CacheRoom:
    return CacheRoom(pictures=1200, size=3_000_000_000, folder=folder, processes=processes)


def test_more_than_the_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phi3v.train.memory, "available_memory", lambda: 4_000_000_000)
    room().check()
    with pytest.raises(InputError) as error:
        room(processes=2).check()
    assert str(error.value) == (
        "--vision-cache memory takes up to 3.0 GB for 1,200 pictures in each of 2 processes, this host has "
        "4.0 GB of memory available: choose disk or none"
    )
    assert str(room(processes=2)) == "up to 3.0 GB for 1,200 pictures, in memory of every process"


def test_more_than_the_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already needs no more room."""
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(2_999_000_000))
    folder = tmp_path / "run" / "vision-cache"
    with pytest.raises(InputError) as error:
        room(folder).check()
    assert str(error.value) == (
        f"--vision-cache disk takes up to 3.0 GB for 1,200 pictures in {folder}, 3.0 GB are free: choose another "
        "--vision-cache-dir, or none"
    )
    assert asked == [tmp_path], "the nearest folder that is there"
    folder.mkdir(parents=True)
    (folder / "one.safetensors").write_bytes(bytes(1_000_000))
    room(folder).check()
    assert str(room(folder)) == f"up to 3.0 GB for 1,200 pictures, in {folder} (1.0 MB are there)"


def test_too_little_room_ends_a_run_before_it_begins(
    settings_for: MAKE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phi3v.train.memory, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"takes up to 0\.1 MB for 4 pictures, this host has 0\.0 MB"):
        train(settings_for(vision_cache="memory", freeze=("vision",)))
    assert list(tmp_path.iterdir()) == []
