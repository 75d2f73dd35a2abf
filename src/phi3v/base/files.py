"""What is written whole or not at all: folders and files that appear under their name once they are on disk."""

from __future__ import annotations

import fcntl
import hashlib
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
def written_whole(target: Path, *, new: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` once its block is done and its files are on disk; or nothing at all.

    An existing `target` is replaced; with `new` it must be empty. Waits for another process that writes it. Raises
    InputError when writing fails, on a full disk for instance; `target` then is as it was before.
    """
    if Path.cwd().is_relative_to(target.resolve()):  # to the shell that stands there, it would vanish
        raise InputError(f"{target} is the current folder, or holds it: choose another folder")
    make_folder(target.parent)
    lock = target.with_name(f".{target.name}.writing")
    with locked(lock, f"waiting for another process that writes {target}", wait=True):
        try:
            if new and target.exists() and not (target.is_dir() and not any(target.iterdir())):
                raise InputError(f"{target} is not empty: choose another folder, or remove it")
            temporary = begin(target)
            with disk_errors(target):
                yield temporary
            finish(temporary, target)
        finally:
            shutil.rmtree(target.with_name(f".{target.name}.unfinished"), ignore_errors=True)
            lock.unlink(missing_ok=True)


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
def locked(file: Path, message: str, *, wait: bool = False) -> Iterator[str]:
    """Hold a lock until the block or the process ends; yield the text that says who holds it, which `file` contains.

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
        if not os.fstat(stream.fileno()).st_nlink:  # its holder has removed it: now the name is another file's
            with locked(file, message, wait=wait) as holder:
                yield holder
            return
        holder = f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        stream.truncate(0)
        stream.write(holder)
        stream.flush()
        yield holder


def make_folder(folder: Path) -> None:
    """Makes a folder, with those it lies in, unless it is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = file.parent / f".{file.name}.unfinished"
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {error}") from error


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
