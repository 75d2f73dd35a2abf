"""Whose folder it is: a run folder is claimed by one run, locked against a second, and never overwritten."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from phi3v.base.config import Run, load_run
from phi3v.base.errors import InputError
from phi3v.base.files import make_folder
from phi3v.base.jsonfile import NULL, OBJECT, check_values, read_object

LOCK = ".lock"
BEFORE_IT_BEGAN = {"environment.json", "images.json", "lengths.json"}
BEFORE_IT_BEGAN |= {LOCK, *(f".{name}.unfinished" for name in (*BEFORE_IT_BEGAN, "config.json"))}
"""All there is of a run that was killed before its config.json was written, which makes a folder a run's."""


class Claim(NamedTuple):
    """What was found in the folder."""

    started: bool
    """It holds an unfinished run that is to go on."""
    finished: bool
    """It holds a run that is done: nothing is left to do."""


def claim(run: Run) -> Claim:
    """Looks into the run folder before anything is loaded. Raises InputError unless this run may write there."""
    folder, resume = run.keeping.out, run.keeping.resume == "auto"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: choose another folder")
    if not (folder / "config.json").exists():
        if folder.exists() and any(path.name not in BEFORE_IT_BEGAN for path in folder.iterdir()):
            raise InputError(f"--out {folder} is not empty and holds no run: choose another folder")
        return Claim(False, False)  # the folder is made when there is something to put in it
    if (folder / "metrics.json").exists():
        if not resume:
            raise InputError(f"--out {folder} holds a finished run: choose another folder")
        _same_settings(run, load_run(folder))
        return Claim(True, True)
    if not resume:
        raise InputError(
            f"--out {folder} holds an unfinished run: add --resume auto to go on with it, or choose another folder"
        )
    _same_settings(run, load_run(folder))
    _same_data(run, folder)
    return Claim(True, False)


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Keeps a second writer out of the folder; yields who holds it. It ends with the process, however that ends."""
    make_folder(folder)
    try:
        stream = open(folder / LOCK, "a+")  # noqa: SIM115  (held open for the lock's sake)
    except OSError as error:
        raise InputError(f"cannot write {folder / LOCK}: {error.strerror}") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in data workers of a dead run
        except OSError as error:
            stream.seek(0)
            raise InputError(f"--out {folder}: another run is writing here ({stream.read() or 'unknown'})") from error
        holder = f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        stream.truncate(0)
        stream.write(holder)
        stream.flush()
        yield holder


def check_shared(folder: Path, holder: str, wait_s: float = 30.0) -> None:
    """Raises InputError unless the folder is the one that `holder` has locked. A network file system may take its time.

    Not for the process that holds the lock: reading the file would end it.
    """
    until = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            if (folder / LOCK).read_text() == holder:
                return
        if time.monotonic() > until:
            raise InputError(
                f"--out {folder} on {platform.node()} is not the folder of rank 0 ({holder}): "
                "with several hosts it must be on a file system that all of them share"
            )
        time.sleep(0.2)


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of the data files, by flag."""
    files = {"train": run.data.train, "eval": run.data.eval}
    return {flag: hashlib.sha256(file.read_bytes()).hexdigest() for flag, file in files.items() if file}


# What may differ between a run and its continuation: how the work is spread, what surrounds the loop, what is kept not
# to be computed again, and what is done when something goes wrong, for until then it has changed nothing.
FREE_GROUPS = ("scaling", "keeping")
FREE_FLAGS = ("num_workers", "on_bad_example")


def _same_settings(run: Run, before: Run) -> None:
    """Going on exactly means with the same settings, but for those that are free."""
    ours, theirs = run.to_dict(), before.to_dict()
    for group in ours:
        for name, value in ours[group].items():
            free = name in FREE_FLAGS or (group in FREE_GROUPS and name != "seed")
            if not free and theirs[group].get(name, value) != value:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--resume: --{flag} was {theirs[group].get(name)} in {before.keeping.out}, now it is {value}"
                )


def _same_data(run: Run, folder: Path) -> None:
    """Nor may the data files: their digests were kept with the run."""
    file = folder / "environment.json"
    content = read_object(file) if file.exists() else {}
    check_values(f"{file}: ", content, {"data": NULL | OBJECT})
    before = content.get("data") or {}
    for flag, digest in digests(run).items():
        if before.get(flag, digest) != digest:
            path = getattr(run.data, flag)
            raise InputError(f"--resume: --{flag} {path} has changed since the run began; start a new run with it")
