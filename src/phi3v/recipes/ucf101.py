"""UCF101: what does somebody do in a short video, seen in eight frames?

Task      "Classify the video into one of the following classes: ApplyEyeMakeup, ..., BenchPress."; the class is the
          answer
Source    the ten-class subset UCF101_subset.tar.gz (sayakpaul/ucf101-subset on the Hub), or the full set, UCF101.rar
          unpacked, with the lists of UCF101TrainTestSplits-RecognitionTask.zip (crcv.ucf.edu/data/UCF101.php); clips
          from YouTube, for research
Split     of the subset 300 videos to train on and 30 (val) to evaluate on, as in the original recipe, which leaves the
          75 of test aside; of the full set the official split 1, 2 or 3, whose test is evaluated on: it has no val
Frames    eight of those that decode, the first and then one every eighth of the video; four crops a frame at most,
          757 tokens, so that a video has about 6,200
Scores    none published, and none of ours: the settings are what works for the other tasks
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from rich.markup import escape

from phi3v.base.config import Base, Keeping, Run
from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.pool import forked_map, num_cores
from phi3v.data.archive import unpack
from phi3v.data.schema import iter_jsonl, lines
from phi3v.data.video import pyav
from phi3v.data.writer import DatasetWriter, writing
from phi3v.recipes.conversion import alone, folder_for
from phi3v.recipes.sources import download, nothing_found
from phi3v.recipes.table import Row, Table, TaskOptions, with_mode

HUB = "sayakpaul/ucf101-subset"
SUBSET, FULL, LISTS = "UCF101_subset.tar.gz", "UCF101.rar", "UCF101TrainTestSplits-RecognitionTask.zip"
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
    """A folder that convert_ucf101.py made, or one with the data set as it was downloaded, packed or unpacked. Default:
    the subset is downloaded from the Hugging Face Hub."""

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
        train=run.data.train or folder / "ucf101_train.jsonl",
        eval=run.data.eval or (val if val.exists() else test),
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
        lists: The official lists of the full set, UCF101TrainTestSplits-RecognitionTask.zip or the folder it was
            unpacked to. Default: they lie beside or in what --archive names.
        split: Official split of the full set. Default: 1.
        num_frames: Frames of a video, at equal distances.
        on_bad_video: A video that does not decode or has too few frames. stop: nothing is converted. skip: it is left
            out. Either way it is named.
        num_workers: Processes that decode. Default: one for every core.
    """
    if num_frames < 1:
        raise InputError(f"--num_frames is {num_frames}, it must be at least 1")
    if num_workers is not None and num_workers < 1:
        raise InputError(f"--num_workers is {num_workers}, it must be at least 1")
    pyav()
    with alone(out_dir):
        if not is_converted(out_dir, num_frames):
            source = _source(archive)
            with (
                writing(out_dir, "ucf101") as writer,
                _unpacked(source, tmp_dir) as folder,
                _unpacked(lists or _lists_near(source, folder) or folder, tmp_dir) as lists_folder,
            ):
                videos, labels = find_videos(folder, lists_folder, split)
                _write(videos, labels, writer, num_frames, on_bad_video, num_workers or num_cores())
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
    videos: Sequence[Video],
    labels: Sequence[str],
    writer: DatasetWriter,
    num_frames: int,
    on_bad_video: str,
    num_workers: int,
) -> None:
    def put_frames(video: Video) -> list[str] | InputError:
        try:
            return writer.put_frames(f"{video.split}/{video.label}/{video.file.stem}", video.file, num_frames)
        except InputError as error:
            return error

    question = f"Classify the video into one of the following classes: {', '.join(labels)}."
    bad: list[InputError] = []
    usable: set[tuple[str, str]] = set()
    results = forked_map(put_frames, videos, num_workers)
    with progress_bar("extracting frames", len(videos), "videos") as advance:
        for number, (video, frames) in enumerate(zip(videos, results, strict=True)):
            if isinstance(frames, InputError):
                bad.append(frames)
                say(f"[bold red]cannot be used[/]  {escape(str(frames))}")
            else:
                usable.add(video[:2])
                turn = {"images": frames, "user": question, "assistant": video.label}
                record = {"id": f"{video.split}-{number:010d}", "conversations": [turn]}
                writer.add(f"ucf101_{video.split}", record, str(video.file))
            advance(1)
    if bad and on_bad_video == "stop":
        raise InputError(
            f"{len(bad)} of {len(videos)} videos cannot be used, {bad[0]}; leave them out with --on_bad_video skip"
        )
    if empty := sorted({video[:2] for video in videos} - usable):
        raise InputError(f"no video of {'/'.join(empty[0])} can be used")


# -- the videos ------------------------------------------------------------------------------------------------------


def _source(archive: Path | None) -> Path:
    """The archive or folder to take the videos from."""
    if archive is None:
        return download(HUB, SUBSET, flag="--archive (phi3v train: --data-dir)") / SUBSET
    if not archive.exists():
        raise InputError(f"{archive}: no such archive or folder")
    packed = [archive / name for name in (SUBSET, FULL) if (archive / name).is_file()]
    return packed[0] if packed and not _videos_in(archive) else archive


def _lists_near(source: Path, folder: Path) -> Path | None:
    """The official lists, packed or unpacked, in a folder or beside its source."""
    patterns = ("trainlist01.txt", "*/trainlist01.txt", LISTS)
    found = (file for place in (folder, source.parent) for pattern in patterns for file in sorted(place.glob(pattern)))
    file = next(found, None)
    return file if file is None or file.name == LISTS else file.parent


@contextmanager
def _unpacked(archive: Path, tmp_dir: Path) -> Iterator[Path]:
    """The folder an archive is unpacked to, removed if the block succeeds; a folder is itself."""
    if archive.is_dir():
        yield archive
        return
    if not archive.is_file():
        raise InputError(f"{archive}: no such archive or folder")
    state = archive.stat()
    folder = tmp_dir / f"{archive.name}-{state.st_size}-{state.st_mtime_ns}"
    if not folder.exists():
        with progress_bar(f"unpacking {archive.name}", state.st_size, "bytes") as advance:
            unpack(archive, folder, advance)
    yield folder
    shutil.rmtree(folder)
    with suppress(OSError):  # something else is in it
        tmp_dir.rmdir()


def find_videos(folder: Path, lists: Path, split: int | None) -> tuple[list[Video], list[str]]:
    """The videos of the subset, or of a split of the full set, and the names of all classes, both in order.

    Raises InputError with the files that are expected and what was found.
    """
    files = _videos_in(folder)
    if not files:
        raise nothing_found(folder, "UCF101", (SUBSET, "train/CLASS/*.avi with val/ and test/", FULL, "CLASS/*.avi"))
    divided = any(_split_of(file, folder) for file in files)
    if divided and split is not None:
        raise InputError(f"--split is for the full set: {folder} is divided into train, val and test already")
    videos, labels = _of_subset(folder, files) if divided else _of_full_set(folder, files, lists, split or 1)
    counts = Counter((video.split, video.label) for video in videos)
    for name, label in itertools.product(SPLITS if divided else ("train", "test"), sorted(labels)):
        if not counts[name, label]:
            raise InputError(f"{folder}: no video of {label} in {name}, {len(videos):,} are elsewhere")
    return sorted(videos, key=lambda video: (SPLITS.index(video.split), video.label, video.file.name)), sorted(labels)


def _videos_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.avi") if not file.name.startswith("."))  # ._x is a Mac's


def _split_of(file: Path, folder: Path) -> str | None:
    """The SPLIT of folder/.../SPLIT/CLASS/VIDEO.avi."""
    *_, split, _, _ = ("", "", *file.relative_to(folder).parts)
    return split if split in SPLITS else None


def _of_subset(folder: Path, files: Sequence[Path]) -> tuple[list[Video], set[str]]:
    root = next(file for file in files if _split_of(file, folder)).parents[2]
    videos = []
    for file in files:
        split = _split_of(file, folder)
        if split is None or file.parents[2] != root:
            raise InputError(f"{file} is not where it is expected: {root}/{{train,val,test}}/CLASS/VIDEO.avi")
        videos.append(Video(split, file.parent.name, file))
    return videos, {path.name for split in SPLITS for path in (root / split).glob("[!.]*/")}


def _of_full_set(folder: Path, files: Sequence[Path], lists: Path, split: int) -> tuple[list[Video], set[str]]:
    """The videos in the lists: trainlist01.txt has lines "CLASS/VIDEO.avi NUMBER", testlist01.txt lacks the numbers."""
    there: dict[str, Path] = {}
    for file in files:
        if (twin := there.setdefault(f"{file.parent.name}/{file.name}", file)) != file:
            raise InputError(f"{file} is also {twin}: name one of the folders")
    videos = []
    for name in ("train", "test"):
        found = sorted(lists.rglob(f"{name}list{split:02d}.txt"))
        if not found:
            raise InputError(
                f"{folder} has neither train, val and test nor the official lists: put {LISTS} beside it or name it "
                "with --lists (videos of your own are for phi3v convert video-folder)"
            )
        for _, line in lines(found[0]):
            listed = line.decode(errors="replace").split()[0]
            videos.append(Video(name, listed.partition("/")[0], there.get(listed, folder / listed)))
    if missing := [video.file for video in videos if not video.file.is_file()]:
        have = f"{len(videos) - len(missing):,} of the {len(videos):,} listed videos are there"
        raise InputError(f"{missing[0]} is missing: {have}")
    return videos, {video.label for video in videos}
