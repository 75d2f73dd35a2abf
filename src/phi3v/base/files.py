"""What is written whole or not at all: folders and files that appear under their name once they are on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from phi3v.base.errors import InputError


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` once its block is done and its files are on disk; or nothing at all.

    An existing `target` is replaced. Raises InputError when writing fails, a full disk for one; `target` then is as
    it was before.
    """
    temporary = begin(target)
    try:
        with disk_errors(target):
            yield temporary
        finish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(target: Path) -> Path:
    """Makes the temporary folder that `finish` will rename to `target`; for several writers, else `written_whole`."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.unfinished")
    for rubbish in (temporary, target.with_name(f".{target.name}.replaced")):
        shutil.rmtree(rubbish, ignore_errors=True)
    with disk_errors(target):
        temporary.mkdir()
    return temporary


def finish(temporary: Path, target: Path) -> None:
    """Puts the temporary folder on disk and in the place of `target`."""
    with disk_errors(target):
        for file in temporary.rglob("*"):
            flush(file)
        flush(temporary)
        old = target.with_name(f".{target.name}.replaced")
        if target.exists():  # for an instant nothing has its name; it never stands for something half deleted
            os.replace(target, old)
        os.replace(temporary, target)
        flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """What the disk refuses while `target` is written becomes an InputError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {target}: {error}; what was saved before is untouched") from error


def make_folder(folder: Path) -> None:
    """Makes a folder, with those it lies in, unless it is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.unfinished")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {error}") from error


def flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
