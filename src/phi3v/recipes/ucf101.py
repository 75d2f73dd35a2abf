"""UCF101: what does somebody do in a short video, seen in eight frames?

Task      "Classify the video into one of the following classes: ApplyEyeMakeup, ..., BenchPress."; the class is the
          answer
Source    the ten-class subset UCF101_subset.tar.gz (sayakpaul/ucf101-subset on the Hub), or the full set, UCF101.rar
          and UCF101TrainTestSplits-RecognitionTask.zip, both unpacked (crcv.ucf.edu/data/UCF101.php); clips from
          YouTube, for research
Split     of the subset 300 videos to train on and 30 (val) to evaluate on, as in the original recipe, which leaves the
          75 of test aside; of the full set the official split 1, 2 or 3, whose test is evaluated on: it has no val
Frames    eight of those that decode, the first and then one every eighth of the video; four crops a frame at most,
          757 tokens, so that a video has about 6,200
Scores    none published, and none of ours: the settings are what works for the other tasks
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from rich.markup import escape

from phi3v.base.config import Base, Keeping, Run
from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.files import make_folder
from phi3v.base.jsonfile import Count, check_values
from phi3v.base.pool import forked_map, num_cores
from phi3v.data.hub import download
from phi3v.data.schema import iter_jsonl, lines
from phi3v.data.video import pyav
from phi3v.data.writer import DatasetWriter, writing
from phi3v.recipes.conversion import alone, folder_for
from phi3v.recipes.sources import nothing_found
from phi3v.recipes.table import Row, Table, TaskOptions, with_mode

HUB = "sayakpaul/ucf101-subset"
SUBSET = "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")

TABLE = Table(
    command="phi3v train ucf101",
    metric="accuracy",
    model="Phi-3.5-vision",
    rows=(
        Row(mode="full", batch_size=16, learning_rate=1e-5, epochs=5),
        Row(mode="frozen", batch_size=16, learning_rate=2e-5, epochs=5),
        Row(mode="lora", batch_size=16, lora_rank=64, lora_alpha=128, learning_rate=2e-4, epochs=5),
        Row(mode="qlora", batch_size=16, lora_rank=64, lora_alpha=128, learning_rate=2e-4, epochs=5),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """What the task can be asked for."""

    data_dir: Path | None = None
    """A folder that convert_ucf101.py made, or one with UCF101_subset.tar.gz or with the unpacked videos. Default: the
    subset is downloaded from the Hugging Face Hub."""

    num_frames: int | None = None
    """Frames of a video that is still to be converted. Default: 8."""

    split: Literal[1, 2, 3] | None = None
    """Official split of the full set, if it is still to be converted. Default: 1."""


def settings(options: Options = Options()) -> Run:
    """The run that learns the task; every value can be overridden."""
    run = Run(
        base=Base(model="microsoft/Phi-3.5-vision-instruct", num_crops=4),
        keeping=Keeping(out=Path("runs/ucf101")),
    )
    return with_mode(run, TABLE, options.mode)


def prepare(run: Run, options: Options = Options()) -> Run:
    """The run on the converted data; what is not converted yet, is."""
    if run.data.train and run.data.eval:
        return run
    folder, num_frames = options.data_dir, options.num_frames
    if folder is None or not is_converted(folder, num_frames):
        folder = folder_for(options, "ucf101")
        convert(out_dir=folder, archive=options.data_dir, split=options.split, num_frames=num_frames or NUM_FRAMES)
    val, test = folder / "ucf101_val.jsonl", folder / "ucf101_test.jsonl"
    data = replace(
        run.data,
        train=run.data.train or (folder / "ucf101_train.jsonl",),
        eval=run.data.eval or (val if val.exists() else test,),
    )
    return replace(run, data=data)


# -- the data --------------------------------------------------------------------------------------------------------

NUM_FRAMES = 8


class Video(NamedTuple):
    """A video, and where it belongs."""

    split: str
    label: str
    file: Path


def convert(
    *,
    out_dir: Path = Path("./ucf101"),
    tmp_dir: Path = Path("/tmp/ucf101"),
    archive: Path | None = None,
    lists: Path | None = None,
    split: Literal[1, 2, 3] | None = None,
    num_frames: int = NUM_FRAMES,
    on_bad_video: Literal["stop", "skip"] = "stop",
    num_workers: int | None = None,
) -> None:
    """Turns UCF101 into jsonl with frames: ucf101_{train,val,test}.jsonl, images/SPLIT/CLASS/VIDEO.N.jpg.

    The folder appears once everything is there. A folder that is there already is not converted again.

    Args:
        out_dir: The folder to make.
        tmp_dir: Where an archive is unpacked; what was put there is removed at the end.
        archive: UCF101_subset.tar.gz, or the folder that it or UCF101.rar was unpacked to. Default: the subset is
            downloaded from the Hugging Face Hub.
        lists: Folder of the official lists of the full set. Default: they lie in the folder that --archive names, or
            beside it.
        split: Official split of the full set. Default: 1.
        num_frames: Frames of a video, at equal distances.
        on_bad_video: A video that does not decode or has too few frames. stop: nothing is converted. skip: it is left
            out. Either way it is named.
        num_workers: Processes that decode. Default: one for every core.
    """
    check_values("--", {"num_frames": num_frames}, {"num_frames": Count})
    check_values("--", {"num_workers": num_workers}, {"num_workers": Count | None})
    pyav()
    with alone(out_dir):
        if not is_converted(out_dir, num_frames):
            with writing(out_dir, "ucf101") as writer, _unpacked(archive, tmp_dir) as folder:
                videos = find_videos(folder, lists, split)
                _write(videos, writer, num_frames, on_bad_video, num_workers or num_cores())
    for file in sorted(out_dir.glob("ucf101_*.jsonl")):
        say(f"{sum(1 for _ in lines(file)):>9,}  {escape(str(file))}")


def is_converted(folder: Path, num_frames: int | None = None) -> bool:
    """Whether a folder holds a conversion. Raises InputError if it has another number of frames."""
    train = folder / "ucf101_train.jsonl"
    if not train.exists():
        return False
    if num_frames is not None and (found := len(next(iter_jsonl(train)).images)) != num_frames:
        raise InputError(f"{folder} was converted with --num_frames {found}, not {num_frames}: name another folder")
    return True


def _write(
    videos: Sequence[Video], writer: DatasetWriter, num_frames: int, on_bad_video: str, num_workers: int
) -> None:
    def put_frames(video: Video) -> list[str] | InputError:
        try:
            return writer.put_frames(f"{video.split}/{video.label}/{video.file.stem}", video.file, num_frames)
        except InputError as error:
            return error

    labels = sorted({video.label for video in videos})
    question = f"Classify the video into one of the following classes: {', '.join(labels)}."
    bad: list[InputError] = []
    results = forked_map(put_frames, videos, num_workers)
    with progress_bar("extracting frames", len(videos), "videos") as advance:
        for number, (video, frames) in enumerate(zip(videos, results, strict=True)):
            if isinstance(frames, InputError):
                bad.append(frames)
                say(f"[bold red]cannot be used[/]  {escape(str(frames))}")
            else:
                turn = {"images": frames, "user": question, "assistant": video.label}
                record = {"id": f"{video.split}-{number:010d}", "conversations": [turn]}
                writer.add(f"ucf101_{video.split}", record, str(video.file))
            advance(1)
    if bad and on_bad_video == "stop":
        raise InputError(
            f"{len(bad)} of {len(videos)} videos are unusable, {bad[0]}; --on_bad_video skip leaves them out"
        )


# -- the videos ------------------------------------------------------------------------------------------------------


@contextmanager
def _unpacked(archive: Path | None, tmp_dir: Path) -> Iterator[Path]:
    """The folder of the videos: `archive` itself, or what it is unpacked to until the block ends."""
    if archive is None:
        archive = download(HUB, SUBSET, flag="--archive (phi3v train: --data-dir)") / SUBSET
    elif (archive / SUBSET).is_file():
        archive /= SUBSET
    if archive.is_dir():
        yield archive
        return
    make_folder(tmp_dir)
    with TemporaryDirectory(dir=tmp_dir) as folder:
        say(f"unpacking {escape(archive.name)}")
        try:
            with tarfile.open(archive) as tar:  # whatever its name says, the published one is a plain tar
                for member in filter(tarfile.TarInfo.isreg, tar):  # without links, a path is what it says
                    file = Path(folder, member.name)
                    if not file.resolve().is_relative_to(Path(folder).resolve()):
                        raise InputError(f"{archive} cannot be unpacked: {member.name} leads out of its folder")
                    make_folder(file.parent)
                    tar.makefile(member, file)
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            raise InputError(f"{archive} cannot be unpacked: {error}") from error
        yield Path(folder)


def find_videos(folder: Path, lists: Path | None = None, split: int | None = None) -> list[Video]:
    """The videos of the subset, or of a split of the full set, in order.

    Raises InputError with the files that are expected and what was found.
    """
    files = sorted(file for file in folder.rglob("*.avi") if not file.name.startswith("."))  # ._x is a Mac's
    if not files:
        raise nothing_found(folder, "UCF101", (SUBSET, "train/CLASS/*.avi with val/ and test/", "CLASS/*.avi"))
    divided = any(_split_of(file, folder) in SPLITS for file in files)
    if divided and split is not None:
        raise InputError(f"--split is for the full set: {folder} is divided into train, val and test already")
    videos = _of_subset(folder, files) if divided else _of_full_set(folder, files, lists, split or 1)
    expected = product(SPLITS if divided else ("train", "test"), {video.label for video in videos})
    if missing := {*expected} - {video[:2] for video in videos}:
        raise InputError(f"{folder}: no video of {'/'.join(min(missing))}")
    return sorted(videos, key=lambda video: (SPLITS.index(video.split), video.label, video.file.name))


def _split_of(file: Path, folder: Path) -> str:
    """The SPLIT of folder/.../SPLIT/CLASS/VIDEO.avi."""
    return file.parents[1].name if file.parents[1] != folder else ""


def _of_subset(folder: Path, files: Sequence[Path]) -> list[Video]:
    root = next(file for file in files if _split_of(file, folder) in SPLITS).parents[2]
    for file in files:
        if file.parents[1] not in [root / split for split in SPLITS]:
            raise InputError(f"{file} is not where it is expected: {root}/{{train,val,test}}/CLASS/VIDEO.avi")
    return [Video(file.parents[1].name, file.parent.name, file) for file in files]


def _of_full_set(folder: Path, files: Sequence[Path], lists: Path | None, split: int) -> list[Video]:
    """The videos in the lists: trainlist01.txt has lines "CLASS/VIDEO.avi NUMBER", testlist01.txt lacks the numbers."""
    there = {f"{file.parent.name}/{file.name}": file for file in files}
    places = [lists] if lists else [folder, folder.parent]
    videos = []
    for name in ("train", "test"):
        patterns = (f"{name}list{split:02d}.txt", f"*/{name}list{split:02d}.txt")
        found = [file for place in places for pattern in patterns for file in place.glob(pattern)]
        if not found:
            raise InputError(
                f"{folder} has neither train, val and test nor {patterns[0]} of the official lists: name their folder "
                "with --lists (videos of your own are for phi3v convert video-folder)"
            )
        for where, line in lines(found[0]):
            listed = line.decode(errors="replace").split()[0]
            if listed not in there:
                raise InputError(f"{where}: {listed} is not in {folder}")
            videos.append(Video(name, there[listed].parent.name, there[listed]))
    return videos
