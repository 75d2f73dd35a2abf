"""What is written appears whole under its name, or not at all."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from phi3v.base import files
from phi3v.base.errors import InputError
from phi3v.base.files import locked, make_folder, write_text, written_whole

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(target: Path, name: str, error: BaseException | None = None) -> None:
    with written_whole(target) as folder:
        (folder / name).write_text(name)
        assert not (target / name).exists()
        if error is not None:
            raise error


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "final"
    write(target, "a")
    with pytest.raises(KeyboardInterrupt):
        write(target, "b", KeyboardInterrupt())
    assert names(tmp_path) == ["final", "final/a"]
    write(target, "b")
    assert names(tmp_path) == ["final", "final/b"]


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left")], ids=["OSError", "safetensors"])
def test_a_full_disk_keeps_the_folder_that_was_there(error: Exception, tmp_path: Path) -> None:
    write(tmp_path / "final", "a")
    with pytest.raises(InputError, match=r"cannot write .*final: .*No space left.*; what was saved before is untouch"):
        write(tmp_path / "final", "b", error)
    assert names(tmp_path) == ["final", "final/a"]


def test_a_folder_appears_only_when_its_files_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, replace = [], files.os.replace

    def appear(temporary: Path, target: Path) -> None:
        assert {path.name for path in flushed} == {"a", "more", "b", temporary.name}
        replace(temporary, target)

    monkeypatch.setattr(files, "flush", flushed.append)
    monkeypatch.setattr(files.os, "replace", appear)
    with written_whole(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
        (folder / "more").mkdir()
        (folder / "more" / "b").write_text("2")
    assert flushed[-1] == tmp_path, "and the rename itself"
    assert names(tmp_path) == ["final", "final/a", "final/more", "final/more/b"]


def test_a_killed_writer_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".final.unfinished").mkdir()
    (tmp_path / ".final.unfinished" / "half").write_text("")
    write(tmp_path / "final", "b")
    assert names(tmp_path) == ["final", "final/b"]


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    write_text(file, "good ☺")
    monkeypatch.setattr(files, "flush", lambda path: (_ for _ in ()).throw(FULL))
    with pytest.raises(InputError, match=r"cannot write .*metrics\.json: .*No space left"):
        write_text(file, "better")
    assert file.read_text(encoding="utf-8") == "good ☺"
    assert names(tmp_path) == ["metrics.json"]


def test_folders_are_made_with_those_they_lie_in_or_the_reason_is_said(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the folder .*file/c: Not a directory"):
        make_folder(tmp_path / "file" / "c")
    with pytest.raises(InputError, match=r"cannot make the folder .*file/c: Not a directory"):
        write(tmp_path / "file" / "c" / "final", "a")


def _hold(file: Path, held: Any, release: Any) -> None:
    with locked(file, "unused"):
        held.set()
        release.wait(30)


def test_a_lock_says_who_holds_it_and_can_be_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", held, release))
    process.start()
    assert held.wait(30)
    with (
        pytest.raises(InputError, match=rf"busy \(process {process.pid} on .* since "),
        locked(tmp_path / "lock", "busy"),
    ):
        pass
    threading.Timer(0.2, release.set).start()
    with locked(tmp_path / "lock", "waiting", wait=True):
        assert f"waiting (process {process.pid} on" in capsys.readouterr().out
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    process.join()
    with locked(tmp_path / "lock", "busy"):
        pass
    assert (tmp_path / "lock").read_text()
    with pytest.raises(InputError, match=r"cannot write .*gone/lock"), locked(tmp_path / "gone/lock", "busy"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", held, context.Event()))
    process.start()
    assert held.wait(30)
    process.kill()
    process.join()
    with locked(tmp_path / "lock", "busy"):
        pass
