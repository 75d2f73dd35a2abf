"""A process that has imported phi3v once, and forks a run of its own for every order it reads, so that many can die.

An order is a line of JSON: {"arguments": of the command line, "said": file for what it prints, "mischief": [[name,
...], ...]}; the answers are two lines, the process id of the run and its exit status (negative: the signal).
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import conversion_mapping

import phi3v.train.loop
from phi3v.cli import main

# -- what can go wrong, by the name of the function; every one is called before the run begins -----------------------


def changes(folder: str, record: str, die_before: str | None = None) -> None:
    """Writes a line into `record` before every change of a run folder, as `mkdir checkpoints`; is killed before one."""
    lines = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and (path := CHANGES[event](*arguments)) and path.startswith(folder):
            change = f"{event.removeprefix('os.')} {os.path.relpath(path, folder)}"
            os.write(lines, f"{change}\n".encode())
            if change == die_before:
                DEEDS["die"]()

    sys.addaudithook(watch)


def _in(descriptor: int, path: Any) -> str:
    return os.path.join("" if descriptor == -1 else os.readlink(f"/proc/self/fd/{descriptor}"), path)


# Audit events -> the path of what is about to change, if anything.
CHANGES: dict[str, Callable[..., str | None]] = {
    "open": lambda path, mode, flags: str(path) if flags & (os.O_WRONLY | os.O_RDWR) else None,
    "os.rename": lambda path, to, *directories: str(to),
    "os.remove": lambda path, directory: _in(directory, path),
    "os.rmdir": lambda path, directory: _in(directory, path),
    "os.mkdir": lambda path, mode, directory: None if os.path.exists(path) else str(path),
}


def places(record: str) -> None:
    """Writes a line into `record` on the way into and out of every place."""
    lines = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def around(place: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        os.write(lines, f"> {place}\n".encode())
        try:
            return work(*arguments, **named)
        finally:
            os.write(lines, f"< {place}\n".encode())

    for target, place in PLACES.items():
        _wrap(target, functools.partial(around, place))


PLACES = {
    "phi3v.train.setup:open_folder": "opening the folder",
    "phi3v.train.setup:resume": "resuming",
    "phi3v.train.loop:learn": "training",
    "phi3v.train.loop:finish": "finishing",
    "phi3v.train.scoring:predict": "evaluation",
    "phi3v.train.loop:save_checkpoint": "checkpoint",
    "phi3v.train.loop:save_model": "final model",
    "phi3v.train.loop:write_report": "report",
}


def when(target: str, calls: list[int], deed: str, *what: Any) -> None:
    """Does a deed before these calls (1: the first) of `module:function`."""
    number = itertools.count(1)

    def before(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if next(number) in calls:
            DEEDS[deed](*what)
        return work(*arguments, **named)

    _wrap(target, before)


def put(target: str, value: Any) -> None:
    """Another value for `module:NAME`, or for a dataclass's default, `module:Class.field`."""
    owner, name = _owner(target)
    setattr(owner, name, value)
    if dataclasses.is_dataclass(owner):
        owner.__init__.__kwdefaults__[name] = value


def spoil(target: str, calls: list[int], factor: float) -> None:
    """Multiplies what these calls return."""
    number = itertools.count(1)

    def after(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return work(*arguments, **named) * (factor if next(number) in calls else 1.0)

    _wrap(target, after)


def slow(target: str, seconds: float) -> None:
    """Works for so long, and to no end, before every call."""

    def before(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        DEEDS["dawdle"](seconds)
        return work(*arguments, **named)

    _wrap(target, before)


def half_written(call: int) -> None:
    """Is killed when half of the tensors of the n-th checkpoint are in their file."""
    number = itertools.count(1)

    def half(save: Callable[..., Any], tensors: Any, file: Path, **named: Any) -> None:
        save(tensors, file, **named)
        if next(number) == call:
            os.truncate(file, file.stat().st_size // 2)
            DEEDS["die"]()

    _wrap("phi3v.train.checkpoint:save_file", half)


def half_a_line(call: int) -> None:
    """Is killed in the middle of the n-th line of the log."""
    number = itertools.count(1)

    def half(write: Callable[..., Any], log: Any, entry: dict[str, Any]) -> None:
        if next(number) == call:
            with open(log.file, "a") as stream:
                stream.write(json.dumps(entry)[:40])
            DEEDS["die"]()
        write(log, entry)

    _wrap("phi3v.train.runlog:RunLog.write", half)


def measured(record: str, every: int) -> None:
    """Writes this process's memory, files, threads and children into `record`, every so many steps."""

    def after(step: Callable[..., Any], log: Any, entry: dict[str, Any]) -> None:
        step(log, entry)
        if entry["step"] % every == 0:
            own = Path("/proc/self")
            pages = int((own / "statm").read_text().split()[1])
            counts = {
                "step": entry["step"],
                "rss": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": len(os.listdir(own / "fd")),
                "threads": len(os.listdir(own / "task")),
                "children": len((own / "task" / str(os.getpid()) / "children").read_text().split()),
            }
            with open(record, "a") as stream:
                stream.write(json.dumps(counts) + "\n")

    _wrap("phi3v.train.runlog:RunLog.step", after)


def _dawdle(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def _fill(file: str) -> None:
    """Until there is no room left on its disk."""
    with suppress(OSError), open(file, "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1024))


def _fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


DEEDS: dict[str, Callable[..., Any]] = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "signal": lambda number: os.kill(os.getpid(), number),
    "signal all": lambda number: os.killpg(0, number),
    "dawdle": _dawdle,
    "sleep": time.sleep,
    "remove": os.remove,
    "fill": _fill,
    "fail": _fail,
    "copy": lambda folder, to: shutil.copytree(folder, to, dirs_exist_ok=True),
    "cut": lambda file: os.truncate(file, 20),
    "kill a worker": lambda: os.kill(
        int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]), signal.SIGKILL
    ),
}


def _owner(target: str) -> tuple[Any, str]:
    """What has the name at the end of `module:name` or `module:class.name`, and that name."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def _wrap(target: str, around: Callable[..., Any]) -> None:
    """Puts `around(function, *arguments)` in the place of a function."""
    owner, name = _owner(target)
    work = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: around(work, *arguments, **named))


# -- orders ----------------------------------------------------------------------------------------------------------


def run(order: dict[str, Any]) -> int:
    """In the process of the run: as `python -m phi3v` with these arguments."""
    os.setsid()
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(said, stream.fileno())
    os.close(said)
    sys.argv = [phi3v.__file__.replace("__init__", "__main__"), *order["arguments"]]
    for name, *what in order["mischief"]:
        globals()[name](*what)
    return main(order["arguments"])


def _import_what_runs_import() -> None:
    Image.init()
    conversion_mapping.get_checkpoint_conversion_mapping("phi3_v")
    for module in ("phi3v.infer.chat", "phi3v.data.convert", "phi3v.publish.merge", "phi3v.recipes", "deepspeed"):
        with suppress(ImportError):
            importlib.import_module(module)


def serve() -> int:
    torch.set_num_threads(1)
    _import_what_runs_import()
    for line in sys.stdin:
        if (process := os.fork()) == 0:
            return run(json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
