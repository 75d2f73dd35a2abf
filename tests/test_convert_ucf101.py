"""The guide's command `python convert_ucf101.py --out_dir DIR`, its flags and what it says."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "vision_finetuning"


@pytest.fixture
def subset(make_video: Callable[..., Path], tmp_path: Path) -> Path:
    for number, split in enumerate(("train", "val", "test")):
        for label in ("Archery", "YoYo"):
            make_video(tmp_path / "subset" / split / label / f"v_{label}_g01_c0{number}.avi", 9 + number)
    return tmp_path / "subset"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs the script in this process and returns its exit status."""

    def script(*flags: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["convert_ucf101.py", *map(str, flags), "--tmp_dir", str(tmp_path / "tmp")])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPTS / "convert_ucf101.py"), run_name="__main__")
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return script


def test_command_of_the_guide(subset: Path, tmp_path: Path, script: Callable[..., int]) -> None:
    assert script("--out_dir", tmp_path / "out", "--archive", subset) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("images", "ucf101_test.jsonl", "ucf101_train.jsonl", "ucf101_val.jsonl")
    ]
    line = json.loads((tmp_path / "out/ucf101_val.jsonl").read_text().splitlines()[0])
    assert line["id"] == "val-0000000002"
    assert line["conversations"][0]["images"][7] == "val/Archery/v_Archery_g01_c01.7.jpg"
    assert line["conversations"][0]["user"] == "Classify the video into one of the following classes: Archery, YoYo."


def test_underscores_and_hyphens(subset: Path, tmp_path: Path, script: Callable[..., int]) -> None:
    flags = ("--archive", subset, "--on_bad_video", "skip")
    assert script("--out_dir", tmp_path / "one", "--num_frames", "3", "--num_workers", "1", *flags) == 0
    assert script("--out-dir", tmp_path / "two", "--num-frames=3", "--num-workers=1", *flags) == 0
    names = [sorted(path.name for path in (tmp_path / out).rglob("*")) for out in ("one", "two")]
    assert names[0] == names[1]
    assert sum(name.endswith(".jpg") for name in names[0]) == 18


def test_data_root_of_the_environment(
    subset: Path, tmp_path: Path, script: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    subset.rename(tmp_path / "root/ucf101")
    monkeypatch.setenv("PHI3V_DATA", str(tmp_path / "root"))
    assert script("--out_dir", tmp_path / "out") == 0
    assert len((tmp_path / "out/ucf101_train.jsonl").read_text().splitlines()) == 2


def test_what_is_wrong_is_one_line(
    subset: Path, tmp_path: Path, script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (subset / "val/YoYo/v_YoYo_g01_c01.avi").write_bytes(b"not a video")
    assert script("--out_dir", tmp_path / "out", "--archive", subset) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: 1 of 6 videos are unusable, ")
    assert said.err.count("\n") == 1
    assert "v_YoYo_g01_c01.avi: unreadable video" in said.out
    assert not list((tmp_path / "out").glob("*.jsonl"))
    assert script("--out_dir", tmp_path / "out", "--split", "4") == 2  # of tyro: not a choice
