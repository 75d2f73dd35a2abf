from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.recipes.conversion import MADE_FROM, NamedImage, Record, Source, convert_once, folder_for, with_converted
from phi3v.recipes.table import TaskOptions

Read = Callable[[Path], list[dict[str, Any]]]


def source(file: Path, *records: Record) -> Source:
    """Every record is a row."""
    splits = list(dict.fromkeys(record.file for record in records))
    return Source(
        name=file.name,
        files=[file],
        splits=splits,
        rows=lambda: (len(records), zip(records)),
        records=lambda record: [record],
    )


def record(id: str, file: str, *images: NamedImage, **more: Any) -> Record:
    return Record(id=id, file=file, images=images, turns=[("what?", "that")], **more)


def prepared(data_dir: Path, sources: list[Source], **choices: Any) -> Run:
    return with_converted(Run(), TaskOptions(data_dir=data_dir), "task", lambda folder: sources, **choices)


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


@pytest.fixture
def data_dir(tmp_path: Path, published: ModuleType) -> Path:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "data.json").write_text("{}")
    (folder / "page.PNG").write_bytes(published.picture(9))
    return folder


@pytest.fixture
def sources(data_dir: Path, published: ModuleType) -> list[Source]:
    shown = NamedImage("train/1", published.picture(1)), NamedImage("train/2", published.picture(2, "JPEG"))
    other = NamedImage("test/page", data_dir / "page.PNG")
    more = {"answers": ["that", "it"], "group": "g"}
    records = [record("a", "train", *shown), record("b", "train", shown[0]), record("c", "test", other, **more)]
    return [source(data_dir / "data.json", *records)]


def test_lines_and_pictures(data_dir: Path, sources: list[Source], published: ModuleType, read: Read) -> None:
    run = prepared(data_dir, sources)
    folder = data_dir / "phi3v" / "task"
    assert (run.data.train, run.data.eval) == ((folder / "train.jsonl",), (folder / "test.jsonl",))
    assert [line["conversations"][0].get("images") for line in read(folder / "train.jsonl")] == [
        *(["train/1.png", "train/2.jpg"], ["train/1.png"])
    ]
    turn = {"images": ["test/page.PNG"], "user": "what?", "assistant": "that"}
    assert read(folder / "test.jsonl") == [
        {"id": "c", "source": "task", "conversations": [turn], "answers": ["that", "it"], "group": "g"}
    ]
    assert (folder / "images/train/2.jpg").read_bytes() == published.picture(2, "JPEG")
    assert (folder / "images/test/page.PNG").samefile(data_dir / "page.PNG")
    assert [path.name for path in folder.parent.iterdir() if path != folder] == [".task.lock"]


def test_pictures_are_copied_where_they_cannot_be_linked(
    data_dir: Path, sources: list[Source], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*unused: Any) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    prepared(data_dir, sources)
    copy = data_dir / "phi3v/task/images/test/page.PNG"
    assert copy.read_bytes() == (data_dir / "page.PNG").read_bytes()
    assert not copy.samefile(data_dir / "page.PNG")


def test_preparing_again_changes_nothing(
    data_dir: Path, sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared(data_dir, sources)
    assert "converting data.json: 3 rows" in capsys.readouterr().out
    before = state(data_dir)
    assert prepared(data_dir, sources) == first
    assert state(data_dir) == before
    assert capsys.readouterr().out == ""


def test_other_data_or_choices_are_not_taken_for_the_same(data_dir: Path, sources: list[Source]) -> None:
    prepared(data_dir, sources, size=1)
    with pytest.raises(
        InputError, match=r"phi3v/task was converted from other files or with other options .*remove it"
    ):
        prepared(data_dir, sources, size=2)
    (data_dir / "data.json").write_text("{} ")
    with pytest.raises(InputError, match=r"phi3v/task was converted from other files"):
        prepared(data_dir, sources, size=1)
    shutil.rmtree(data_dir / "phi3v" / "task")
    prepared(data_dir, sources, size=1)


def test_a_data_set_may_be_moved(data_dir: Path, sources: list[Source]) -> None:
    prepared(data_dir, sources)
    moved = data_dir.rename(data_dir.with_name("moved"))
    before = state(moved)
    run = prepared(moved, [replace(sources[0], files=[moved / "data.json"])])
    assert run.data.train == (moved / "phi3v" / "task" / "train.jsonl",)
    assert state(moved) == before


def test_a_folder_of_something_else_is_left_alone(data_dir: Path, sources: list[Source], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "years_of_work.txt").touch()
    options = TaskOptions(data_dir=data_dir, converted_dir=tmp_path / "thesis")
    with pytest.raises(InputError, match="thesis holds something else: choose another --converted-dir"):
        with_converted(Run(), options, "task", lambda folder: sources)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["years_of_work.txt"]


def test_whole_or_not_at_all(data_dir: Path, sources: list[Source]) -> None:
    """Data that turns out to be damaged, a killed run's leftovers, a full disk: no folder that could be mistaken."""

    def broken() -> tuple[int, Iterator[Any]]:
        num_rows, rows = sources[0].rows()
        yield_one = (row for row, _ in zip(rows, range(1), strict=False))

        def failing() -> Iterator[Any]:
            yield from yield_one
            raise InputError("row 1: damaged")

        return num_rows, failing()

    with pytest.raises(InputError, match="row 1: damaged"):
        prepared(data_dir, [replace(sources[0], rows=broken)])
    assert [path.name for path in (data_dir / "phi3v").iterdir()] == [".task.lock"]

    leftover = data_dir / "phi3v" / ".task.unfinished"
    (leftover / "images").mkdir(parents=True)
    (leftover / "train.jsonl").write_text("half a line")
    prepared(data_dir, sources)
    assert len((data_dir / "phi3v/task/train.jsonl").read_text().splitlines()) == 2
    assert not leftover.exists()


def test_full_disk(data_dir: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(*unused: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(InputError, match=r"cannot write .*phi3v/task: .*No space left on device"):
        prepared(data_dir, sources)
    assert [path.name for path in (data_dir / "phi3v").iterdir()] == [".task.lock"]


def test_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_for(TaskOptions(), "task") == Path("data/task")
    assert folder_for(TaskOptions(data_dir=tmp_path), "task") == tmp_path / "phi3v" / "task"
    assert folder_for(TaskOptions(data_dir=tmp_path, converted_dir=Path("x")), "task") == Path("x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert folder_for(TaskOptions(data_dir=tmp_path), "task") == Path("data/task")
    (tmp_path / "phi3v" / "task").mkdir(parents=True)  # by whoever may write there, for all others
    (tmp_path / "phi3v" / "task" / MADE_FROM).write_text("{}")
    assert folder_for(TaskOptions(data_dir=tmp_path), "task") == tmp_path / "phi3v" / "task"


def test_a_place_that_cannot_be_written(data_dir: Path, sources: list[Source]) -> None:
    (data_dir / "phi3v").touch()
    with pytest.raises(InputError, match="phi3v"):
        prepared(data_dir, sources)


def _convert_slowly(folder: Path, started: Any) -> None:
    def find() -> list[Source]:
        with open(folder.with_name("converters"), "a") as log:
            log.write("one\n")
        started.set()
        time.sleep(0.3)
        return [source(folder, record("a", "train"))]

    convert_once(folder, "task", {"n": 1}, find)
    assert (folder / "train.jsonl").exists()


def test_one_process_converts_and_the_others_find_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder, started = tmp_path / "task", context.Event()
    processes = [context.Process(target=_convert_slowly, args=(folder, started)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "converters").read_text() == "one\n"
    assert json.loads((folder / MADE_FROM).read_text()) == {"n": 1}


def test_who_waited_for_a_killed_process_converts_itself(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder, started = tmp_path / "task", context.Event()
    first = context.Process(target=_convert_slowly, args=(folder, started))
    first.start()
    started.wait()
    second = context.Process(target=_convert_slowly, args=(folder, started))
    second.start()
    first.kill()
    second.join()
    assert second.exitcode == 0
    assert (tmp_path / "converters").read_text() == "one\none\n"
    assert (folder / "train.jsonl").exists()
