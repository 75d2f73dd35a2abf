"""What is written whole or not at all: folders and files that appear under their name once they are on disk."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from safetensors import SafetensorError

from phi3v.base.console import say
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


@contextmanager
def locked(file: Path, message: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock until the block or the process ends; `file` says who holds it.

    If another process holds it, `message` and the holder are an InputError, or, with `wait`, printed before waiting.
    The holder must not open the file a second time: closing that would release the lock, as POSIX has it. Forked
    processes do not inherit it, unlike flock's, so no worker of a killed process keeps it.
    """
    try:
        stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the lock is held)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            stream.seek(0)
            message = f"{message} ({stream.read() or 'unknown'})"
            if not wait:
                raise InputError(message) from error
            say(escape(message))
            fcntl.lockf(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        stream.flush()
        yield


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
