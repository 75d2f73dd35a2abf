"""From the videos of UCF101, packed or not, to the guide's tree, its order and text; whole or not at all."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder
from phi3v.cli import main
from phi3v.data import hub
from phi3v.data.schema import read_jsonl
from phi3v.recipes import find_recipe, ucf101
from phi3v.recipes.ucf101 import Options, convert, is_converted, prepare, settings

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'phi3v[video]'")

CLASSES = ["ApplyEyeMakeup", "ApplyLipstick", "Archery", "BabyCrawling", "BalanceBeam", "BandMarching"]
CLASSES += ["BaseballPitch", "Basketball", "BasketballDunk", "BenchPress"]
NUM_TEST = (6, 4, 7, 9, 4, 9, 10, 11, 6, 9)  # per class, as published; 30 to train, 3 to validate


@pytest.fixture(scope="module")
def clips(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve different XVID clips of 9 to 20 frames."""
    folder = tmp_path_factory.mktemp("clips")
    return [make_video(folder / f"{k}.avi", 9 + k, direction=(k % 3, 4 - k % 5)) for k in range(12)]


@pytest.fixture(scope="module")
def subset(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCF101_subset/ with the published number of videos of each class; few clips, many names."""
    root = tmp_path_factory.mktemp("download") / "UCF101_subset"
    for label, num_test in zip(CLASSES, NUM_TEST, strict=True):
        for split, count in (("train", 30), ("val", 3), ("test", num_test)):
            (root / split / label).mkdir(parents=True)
            for k in range(count):
                number = len(label) + 3 * k + len(split)
                shutil.copy(clips[number % 12], root / split / label / f"v_{label}_g{25 - k:02d}_c0{k % 7}.avi")
    return root


@pytest.fixture
def small(clips: list[Path], tmp_path: Path) -> Path:
    """A subset of three classes with 15 videos."""
    for number, (split, label) in enumerate((s, c) for s in ("train", "train", "val", "test", "test") for c in "ABC"):
        folder = tmp_path / "small" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips[number % 12], folder / f"v_{label}_{number:02d}.avi")
    return tmp_path / "small"


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """A function that converts to a folder of its name, with one process."""

    def made(name: str = "out", **flags: Any) -> Path:
        convert(**{"out_dir": tmp_path / name, "tmp_dir": tmp_path / "tmp", "num_workers": 1, **flags})
        return tmp_path / name

    return made


def tar_of(folder: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.add(folder, folder.name)
    return stream.getvalue()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"ucf101_{split}.jsonl").read_text().splitlines()]


def frames_as_in_the_original(video: Path, num_frames: int) -> list[bytes]:
    """By the lines of the original's own functions; these headers are right."""
    with av.open(str(video)) as container:
        total = container.streams.video[0].frames
        indices = np.arange(0, total, total / num_frames).astype(int)
        arrays = [frame.to_ndarray(format="rgb24") for k, frame in enumerate(container.decode(video=0)) if k in indices]
    jpegs = []
    for array in arrays:
        Image.fromarray(array).convert("RGB").save(stream := io.BytesIO(), format="JPEG")
        jpegs.append(stream.getvalue())
    return jpegs


# -- what the guide shows --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide(subset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole subset, converted."""
    out = tmp_path_factory.mktemp("guide") / "out"
    convert(out_dir=out, archive=subset, num_workers=2)
    return out


def test_the_guides_tree(guide: Path) -> None:
    assert sorted(path.name for path in guide.iterdir()) == [
        *("images", "ucf101_test.jsonl", "ucf101_train.jsonl", "ucf101_val.jsonl")
    ]
    assert len([path for path in guide.rglob("*") if path.is_dir()]) == 34
    counts = {
        split: [len(list((guide / "images" / split / label).iterdir())) for label in CLASSES]
        for split in ("train", "val", "test")
    }
    assert counts == {"train": [240] * 10, "val": [24] * 10, "test": [48, 32, 56, 72, 32, 72, 80, 88, 48, 72]}


def test_the_guides_lines(guide: Path) -> None:
    lines = {split: lines_of(guide, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in lines.items()} == {"train": 300, "val": 30, "test": 75}
    text = (guide / "ucf101_val.jsonl").read_text()
    assert text.startswith(
        '{"id": "val-0000000300", "source": "ucf101", "conversations": [{"images": '
        '["val/ApplyEyeMakeup/v_ApplyEyeMakeup_g23_c02.0.jpg", "val/ApplyEyeMakeup/v_ApplyEyeMakeup_g23_c02.1.jpg", '
    )
    assert (
        '.7.jpg"], "user": "Classify the video into one of the following classes: ApplyEyeMakeup, ApplyLipstick, '
        'Archery, BabyCrawling, BalanceBeam, BandMarching, BaseballPitch, Basketball, BasketballDunk, BenchPress.", '
        '"assistant": "ApplyEyeMakeup"}]}\n'
    ) in text
    ids = [line["id"] for found in lines.values() for line in found]
    assert [int(id.rpartition("-")[2]) for id in ids] == list(range(405))
    assert ids[330] == "test-0000000330"
    for split, found in lines.items():
        frames = [line["conversations"][0]["images"][0] for line in found]
        assert frames == sorted(frames)
        assert {line["conversations"][0]["assistant"] for line in found} == {*CLASSES}
        assert all(image.startswith(f"{split}/") for image in frames)
    examples = read_jsonl(guide / "ucf101_train.jsonl")
    assert all(Path(image).is_file() for example in examples for image in example.images)


@pytest.mark.parametrize("num_frames", [1, 4, 8])
def test_frames_are_the_originals_byte_for_byte(small: Path, made: Callable[..., Path], num_frames: int) -> None:
    out = made(archive=small, num_frames=num_frames)
    for video in small.rglob("*.avi"):
        stem = out / "images" / video.relative_to(small).with_suffix("")
        frames = [stem.with_name(f"{stem.name}.{k}.jpg").read_bytes() for k in range(num_frames)]
        assert frames == frames_as_in_the_original(video, num_frames)
    assert len(list(out.rglob("*.jpg"))) == 15 * num_frames


def test_same_bytes_from_archive_and_folder_with_any_number_of_processes(
    small: Path, tmp_path: Path, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.tar").write_bytes(tar_of(small))
    first = files_in(made("one", archive=small))
    assert files_in(made("two", archive=tmp_path / "set.tar", num_workers=3)) == first
    said = capsys.readouterr().out
    assert "unpacking set.tar" in said
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "extracting frames: 15 videos" in said
    (tmp_path / "folder").mkdir()
    (tmp_path / "set.tar").rename(tmp_path / "folder/UCF101_subset.tar.gz")
    assert files_in(made("three", archive=tmp_path / "folder")) == first


def test_from_the_hub(small: Path, tmp_path: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "UCF101_subset.tar.gz").write_bytes(tar_of(small))
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda *place, **kind: asked.append((place, kind)) or tmp_path)
    assert len(lines_of(made(), "train")) == 6
    kind = {"repo_type": "dataset", "allow_patterns": ["UCF101_subset.tar.gz"]}
    assert asked == [(("sayakpaul/ucf101-subset",), kind)]
    assert (tmp_path / "UCF101_subset.tar.gz").exists()

    def offline(*place: Any, **kind: Any) -> str:
        raise OSError("We couldn't connect to the Hub.\nCheck your connection.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"ucf101-subset cannot be read from the Hub .*connect.* with --archive"):
        made("again")


# -- interruptions ---------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_does_not_matter(small: Path, tmp_path: Path, made: Callable[..., Path]) -> None:
    (tmp_path / "set.tar").write_bytes(tar_of(small))
    whole = files_in(made("whole", archive=small))
    out = tmp_path / "out"
    flags = {"out_dir": out, "tmp_dir": tmp_path / "tmp", "archive": tmp_path / "set.tar", "num_workers": 1}
    process = multiprocessing.get_context("fork").Process(target=lambda: convert(**flags))
    process.start()
    while process.is_alive() and not list((tmp_path / ".out.unfinished").rglob("*.jpg")):
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not out.exists()
    assert not is_converted(out)
    assert files_in(made(archive=tmp_path / "set.tar")) == whole
    assert not (tmp_path / ".out.unfinished").exists()


def test_what_is_done_stays_as_it_is(
    small: Path, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(archive=small)
    before = {name: (out / name).stat().st_mtime_ns for name in files_in(out)}
    capsys.readouterr()
    made(archive=small)
    assert {name: (out / name).stat().st_mtime_ns for name in files_in(out)} == before
    assert "6  " in capsys.readouterr().out


def test_two_at_once(small: Path, tmp_path: Path, made: Callable[..., Path]) -> None:
    whole = files_in(made("whole", archive=small))
    flags = {"out_dir": tmp_path / "out", "archive": small, "num_workers": 1}
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=lambda: convert(**flags)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert files_in(tmp_path / "out") == whole


def test_another_conversion_is_not_mixed_in(small: Path, tmp_path: Path, made: Callable[..., Path]) -> None:
    out = made(archive=small)
    with pytest.raises(InputError, match="was converted with --num_frames 8, not 4"):
        made(archive=small, num_frames=4)
    (tmp_path / "else").mkdir()
    (tmp_path / "else/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="else is not empty: choose another folder, or remove it"):
        made("else", archive=small)
    assert (tmp_path / "else/notes.txt").exists()
    assert is_converted(out)


def test_full_disk(small: Path, tmp_path: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    save, count = Image.Image.save, iter(range(1000))

    def full(self: Image.Image, file: Path, **kind: Any) -> None:
        if next(count) == 30:
            raise OSError(28, "No space left on device")
        save(self, file, **kind)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        made(archive=small)
    assert not (tmp_path / "out").exists()


# -- videos that cannot be used --------------------------------------------------------------------------------------


@pytest.fixture
def bad(small: Path, make_video: Callable[..., Path]) -> Path:
    """`small` with three bad videos among 18."""
    make_video(small / "train/A/v_A_few.avi", 5)
    (small / "train/B/v_B_none.avi").touch()
    cut = small / "test/C/v_C_cut.avi"
    cut.write_bytes((small / "test/C/v_C_11.avi").read_bytes()[:100])
    return small


def test_bad_videos_stop(
    bad: Path, tmp_path: Path, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"3 of 18 videos are unusable, .*v_A_few.*--on_bad_video skip"):
        made(archive=bad)
    said = "".join(capsys.readouterr().out.split("\n"))
    for name, reason in (
        ("A_few", "5 frames decode, 8 are needed"),
        ("B_none", "unreadable video"),
        ("C_cut", "cut short"),
    ):
        assert f"v_{name}.avi: {reason}" in said
    assert not (tmp_path / "out").exists()


def test_bad_videos_that_were_mended(bad: Path, made: Callable[..., Path], clips: list[Path]) -> None:
    with pytest.raises(InputError):
        made(archive=bad)
    for name in ("train/A/v_A_few.avi", "train/B/v_B_none.avi", "test/C/v_C_cut.avi"):
        shutil.copy(clips[0], bad / name)
    out = made(archive=bad)
    assert [len(lines_of(out, split)) for split in ucf101.SPLITS] == [8, 3, 7]


def test_bad_videos_are_skipped_on_request(
    bad: Path, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(archive=bad, on_bad_video="skip")
    assert capsys.readouterr().out.count("cannot be used") == 3
    lines = [line for split in ucf101.SPLITS for line in lines_of(out, split)]
    assert len(lines) == 15
    numbers = [int(line["id"].rpartition("-")[2]) for line in lines]
    assert sorted({*range(18)} - {*numbers}) == [2, 5, 17]  # the others keep their ids
    assert len(list(out.rglob("*.jpg"))) == 15 * 8
    assert "_few" not in "".join(files_in(out))


# -- folders that are not as they should be --------------------------------------------------------------------------


def test_wrong_folders(small: Path, clips: list[Path], tmp_path: Path, made: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"empty holds no UCF101: expected UCF101_subset\.tar\.gz or .*; found nothing"
    ):
        made(archive=tmp_path / "empty")
    with pytest.raises(InputError, match=r"gone cannot be unpacked: .*No such file"):
        made(archive=tmp_path / "gone")
    with pytest.raises(InputError, match="--split is for the full set"):
        made(archive=small, split=2)
    with pytest.raises(InputError, match="--num_frames is 0, it must be at least 1"):
        made(archive=small, num_frames=0)
    with pytest.raises(InputError, match="--num_workers is 0, it must be at least 1"):
        made(archive=small, num_workers=0)
    shutil.move(small / "val", tmp_path / "val")
    with pytest.raises(InputError, match="small: no video of val/A"):
        made(archive=small)
    shutil.move(tmp_path / "val", small / "val")
    shutil.copytree(small, small / "copy")
    with pytest.raises(
        InputError, match=r"small/test/A/v_A_09\.avi is not where it is expected: .*\{train,val,test\}/CLASS"
    ):
        made(archive=small)
    shutil.rmtree(small / "copy")
    shutil.copy(clips[0], small / "stray.avi")
    with pytest.raises(InputError, match=r"small/stray\.avi is not where it is expected"):
        made(archive=small)
    (small / "stray.avi").rename(small / "._v_A_00.avi")  # what a Mac leaves everywhere
    assert len(lines_of(made(archive=small), "train")) == 6


def test_order_is_by_class_then_name(small: Path) -> None:
    (small / "train/A/v_A_00.avi").rename(small / "train/A/z.avi")
    assert [video.label for video in ucf101.find_videos(small)] == [*"AABBCC", *"ABC", *"AABBCC"]


def test_hostile_and_damaged_archives(small: Path, tmp_path: Path, made: Callable[..., Path]) -> None:
    with tarfile.open(tmp_path / "escape.tar", "w") as tar:
        tar.add(small, "small")
        tar.add(small / "val/A/v_A_06.avi", "small/../../../evil.avi", filter=lambda info: info)
    data = tar_of(small)
    (tmp_path / "half.tar").write_bytes(data[: len(data) // 2])
    for name, reason in (
        ("escape", "evil.avi leads out of its folder"),
        ("half", "unexpected end of data"),
    ):
        with pytest.raises(InputError, match=f"{name}.tar cannot be unpacked: .*{reason}"):
            made(archive=tmp_path / f"{name}.tar")
    assert not list(tmp_path.rglob("evil.avi"))
    assert not list((tmp_path / "tmp").iterdir())
    assert not (tmp_path / "out").exists()


# -- the full set ----------------------------------------------------------------------------------------------------


class FullSet:
    """UCF-101/CLASS/*.avi of three classes with two groups each, and the official lists, in two splits."""

    def __init__(self, root: Path, clips: list[Path]) -> None:
        self.folder, self.lists = root / "UCF-101", root / "ucfTrainTestlist"
        self.lists.mkdir(parents=True)
        names = ["Archery", "HandstandPushups", "YoYo"]
        self.write("classInd.txt", [f"{number} {name}" for number, name in enumerate(names, start=1)])
        videos: dict[str, list[str]] = {}
        for number, name in enumerate(names):
            (self.folder / name).mkdir(parents=True)
            stem = "HandStandPushups" if name == "HandstandPushups" else name  # as published
            for group in (1, 2):
                video = f"{name}/v_{stem}_g{group:02d}_c01.avi"
                shutil.copy(clips[number + 3 * group], self.folder / video)
                videos.setdefault(f"{group}", []).append(video)
        for split, (test, train) in {1: "12", 2: "21"}.items():
            self.write(f"trainlist{split:02d}.txt", [f"{v} {k}" for k, v in enumerate(videos[train], start=1)])
            self.write(f"testlist{split:02d}.txt", videos[test])

    def write(self, name: str, lines: list[str]) -> None:
        (self.lists / name).write_text("".join(f"{line}\r\n" for line in lines))

    def replace(self, name: str, old: str, new: str) -> None:
        (self.lists / name).write_text((self.lists / name).read_text().replace(old, new))


@pytest.fixture
def full(tmp_path: Path, clips: list[Path]) -> FullSet:
    return FullSet(tmp_path / "full", clips)


@pytest.mark.parametrize(("split", "train_group"), [(None, 2), (1, 2), (2, 1)])
def test_official_splits(full: FullSet, made: Callable[..., Path], split: int | None, train_group: int) -> None:
    out = made(archive=full.folder, split=split)  # the lists lie beside it
    assert sorted(path.name for path in out.iterdir()) == ["images", "ucf101_test.jsonl", "ucf101_train.jsonl"]
    train = lines_of(out, "train")
    assert [line["conversations"][0]["images"][0] for line in train] == [
        f"train/Archery/v_Archery_g0{train_group}_c01.0.jpg",
        f"train/HandstandPushups/v_HandStandPushups_g0{train_group}_c01.0.jpg",
        f"train/YoYo/v_YoYo_g0{train_group}_c01.0.jpg",
    ]
    assert train[0]["conversations"][0]["user"].endswith("following classes: Archery, HandstandPushups, YoYo.")
    assert [line["id"] for line in lines_of(out, "test")] == [f"test-{number:010d}" for number in (3, 4, 5)]


def test_where_the_lists_may_lie(full: FullSet, tmp_path: Path, made: Callable[..., Path]) -> None:
    whole = files_in(made("whole", archive=full.folder))
    assert files_in(made("parent", archive=full.folder.parent)) == whole
    elsewhere = full.lists.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"nor trainlist01\.txt of the official lists: name their folder with --lists"):
        made("without", archive=full.folder)
    assert files_in(made("named", archive=full.folder, lists=elsewhere)) == whole


def test_lists_that_do_not_fit(full: FullSet, made: Callable[..., Path]) -> None:
    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            made(archive=full.folder)

    full.replace("trainlist01.txt", "v_HandStand", "v_Handstand")
    refused(r"trainlist01\.txt:2: HandstandPushups/v_HandstandPushups_g02_c01\.avi is not in .*UCF-101")
    full.replace("trainlist01.txt", "v_Handstand", "v_HandStand")
    full.write("testlist01.txt", ["Archery/v_Archery_g01_c01.avi"])
    refused(r"UCF-101: no video of test/HandstandPushups")
    (full.lists / "testlist01.txt").unlink()
    refused(r"nor testlist01\.txt of the official lists")


# -- the recipe ------------------------------------------------------------------------------------------------------


def test_recipe_is_found() -> None:
    assert find_recipe("ucf101") is ucf101
    assert settings().base.num_crops == 4
    assert settings(Options(mode="lora")).tuning.lora


def test_prepare_takes_what_is_converted(small: Path, made: Callable[..., Path]) -> None:
    out = made(archive=small, num_frames=4)
    before = files_in(out)
    for options in (Options(data_dir=out), Options(data_dir=out, num_frames=4)):
        run = prepare(settings(options), options)
        assert (run.data.train, run.data.eval) == ((out / "ucf101_train.jsonl",), (out / "ucf101_val.jsonl",))
    assert files_in(out) == before
    with pytest.raises(InputError, match="was converted with --num_frames 4, not 8"):
        prepare(settings(), Options(data_dir=out, num_frames=8))


def test_prepare_converts_what_was_downloaded(full: FullSet, tmp_path: Path, small: Path) -> None:
    options = Options(data_dir=full.folder.parent, split=2, num_frames=3)
    run = prepare(settings(options), options)
    folder = full.folder.parent / "phi3v/ucf101"
    assert run.data.train == (folder / "ucf101_train.jsonl",)
    assert run.data.eval == (folder / "ucf101_test.jsonl",)  # no val
    assert all(len(example.images) == 3 for example in read_jsonl(folder / "ucf101_train.jsonl"))
    assert prepare(settings(options), options) == run
    options = Options(data_dir=small, converted_dir=tmp_path / "chosen")
    assert prepare(settings(options), options).data.eval == (tmp_path / "chosen/ucf101_val.jsonl",)


def test_prepare_leaves_a_run_with_its_own_data_alone(tiny_data: Path) -> None:
    run = settings()
    own = ucf101.replace(run, data=ucf101.replace(run.data, train=tiny_data, eval=tiny_data))
    assert prepare(own, Options(data_dir=Path("gone"))) == own


def test_from_the_videos_to_the_score(small: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    out = tmp_path / "run"
    flags = f"--data-dir {small} --num_frames 2 --model {tiny_model_dir} --num-crops 1 --dtype fp32 --num-workers 0"
    flags += f" --batch-size 3 --max-new-tokens 4 --no-eval-before --no-progress --out {out}"
    assert main(["train", "ucf101", *flags.split()]) == 0
    assert RunFolder(out).config.data.eval == (small / "phi3v/ucf101/ucf101_val.jsonl",)
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 3
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["baselines"]["majority"] == pytest.approx(1 / 3)
