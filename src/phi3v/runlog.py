"""What a run tells while it runs: `log.jsonl`, a progress bar, trackers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from phi3v.data.pack import Lost
from phi3v.errors import InputError
from phi3v.files import disk_errors, flush, write_text

console = Console(stderr=False, highlight=False)

# Without a terminal, a line now and then instead of a bar.
SECONDS_BETWEEN_LINES = 20.0


class RunLog:
    """One line a step in `log.jsonl`, the same numbers on the bar and to the trackers. A context manager.

    Only the rank that writes has one with a file; elsewhere `folder` is None and nothing is written or shown.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int,
        first_step: int,
        trackers: Sequence[Any] = (),
        show: bool = True,
        drop_lines: bool = False,
    ) -> None:
        self.file = None if folder is None else folder / "log.jsonl"
        self.trackers, self.total, self.show = trackers, total_steps, show and self.file is not None
        show = self.show
        self.drop_lines = drop_lines
        """Go on without the lines that a full disk refuses."""
        self.skipped = 0
        """Steps so far that changed no weight, because a gradient overflowed in fp16."""
        self.lost = 0
        """How often an example was left out of a step so far, because it could not be read."""
        self._stream: TextIO | None = None
        self._open(first_step or -1)  # a run that starts at step 0 says everything again
        self.bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]} [dim]eta"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not show or not console.is_terminal,
        )
        self._task = self.bar.add_task("training", total=total_steps, completed=first_step, numbers="")
        self._last_line = 0.0

    def _open(self, step: int) -> None:
        if self.file is None:
            return
        kept = self._forget_after(self.file, step)
        self.skipped = sum(entry.get("skipped", False) for entry in kept)
        self.lost = sum(entry.get("kind") == "skip" for entry in kept)
        try:
            self._stream = open(self.file, "a")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error}") from error

    def _take_back(self, size: int) -> None:
        """Gets rid of half a line, both of what is on disk and of what the stream still holds."""
        assert self.file is not None
        with suppress(OSError):
            self._stream.close()  # type: ignore[union-attr]
        os.truncate(self.file, size)
        self._stream = open(self.file, "a")  # noqa: SIM115

    def flush(self) -> None:
        """Waits until all lines are on disk, as a checkpoint is that comes after them."""
        if self.file is not None:
            with disk_errors(self.file):
                flush(self.file)

    def back_to(self, step: int) -> None:
        """Goes on after `step`: what was said later will be said again."""
        if self._stream is not None:
            self._stream.close()
        self._open(step)
        self.bar.update(self._task, completed=step)

    @staticmethod
    def _forget_after(file: Path, step: int) -> list[dict[str, Any]]:
        """A run that is resumed says again what it said after its checkpoint, and scores its end again: that goes.

        Complaints stay, they are nobody's to repeat. Returns what stays.
        """
        if not file.exists():
            return []
        kept = []
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
                told = entry["step"] <= step and entry.get("split") != "final"
                if told or entry["kind"] == "complaint":
                    kept.append(entry)
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing
                continue
        write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))
        return kept

    def __enter__(self) -> RunLog:
        self.bar.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self.bar.stop()
        with suppress(OSError):  # a line that did not fit on the disk was complained about when it was written
            if self._stream is not None:
                self._stream.close()
        for tracker in self.trackers:
            tracker.finish()

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line and passes its numbers to the trackers."""
        if self._stream is None:
            return
        size = os.fstat(self._stream.fileno()).st_size
        line = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # JSON knows no NaN and no Infinity
        try:
            self._stream.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")
            self._stream.flush()
        except OSError as error:
            if not self.drop_lines:
                raise InputError(f"cannot write {self.file}: {error}") from error
            self._take_back(size)
        values = {**entry, **{f"eval/{key}": value for key, value in entry.get("metrics", {}).items()}}
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log(numbers, step=entry["step"])

    def complain(self, step: int, what: str, examples: Sequence[str] = ()) -> None:
        """Says, and keeps, that something was not as it should be."""
        of = f"; its examples are {', '.join(examples)}" if examples else ""
        say(f"[yellow]step {step}:[/] {escape(what + of)}")
        self.write({"kind": "complaint", "step": step, "what": what, "examples": list(examples)})

    def skip(self, step: int, lost: Lost) -> None:
        """Says, and keeps, that an example was left out of a step."""
        say(f"[yellow]step {step}:[/] {escape(f'skipped, it cannot be read: {lost}')}")
        self.write({"kind": "skip", "step": step, "example": lost.id, "where": lost.where, "reason": lost.reason})
        self.lost += 1

    def step(self, entry: dict[str, Any]) -> None:
        """The line of a step, and its essence for the eye."""
        self.write({"kind": "step", **entry})
        self.skipped += entry.get("skipped", False)
        examples, pages = (
            f"{s:.1f}" if s < 100 else f"{s:,.0f}" for s in (entry["examples_per_s"], entry["pages_per_s"])
        )
        numbers = (
            f"[dim]loss[/] {entry['loss']:.3f} [dim]lr[/] {entry['learning_rate']:.1e} {examples} [dim]ex/s[/] "
            f"{pages} [dim]pages/s[/] {entry['tokens_per_s'] / 1000:.1f}k [dim]tok/s[/] "
            f"{entry['tflops']:.2g} [dim]TFLOP/s[/] "
            + (f"{entry['mfu']:.0%} [dim]MFU[/] " if "mfu" in entry else "")
            + f"{entry['memory_gb']:.1f} [dim]GB[/] {entry['data_wait']:.0%} [dim]wait[/]"
            + (f" {self.skipped} [dim]skipped[/]" if self.skipped else "")
        )
        self.bar.update(self._task, completed=entry["step"], numbers=numbers)
        now = time.monotonic()
        due = now - self._last_line > SECONDS_BETWEEN_LINES or entry["step"] == self.total
        if self.show and not console.is_terminal and due:
            self._last_line = now
            console.print(f"step {entry['step']}/{self.total}  {numbers}", soft_wrap=True)


@contextmanager
def progress_bar(
    title: str, total: int, unit: str, *, show: bool = True, summary: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar for long work; yields the function that moves it on. `summary` says at the end how long it took."""
    started = time.monotonic()
    columns = (
        TextColumn(f"[bold]{title}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not show or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
    if show and summary:
        say(f"{title}: {total:,} {unit} in {time.monotonic() - started:.0f} s")


def start_trackers(names: Sequence[str], folder: Path, settings: dict[str, Any]) -> list[Any]:
    """The trackers named by `--track`, told the run's settings, flattened to `group/name`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    flat = {f"{group}/{name}": value for group, values in settings.items() for name, value in values.items()}
    plain = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in flat.items()}
    trackers = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = kind("phi3v", logging_dir=str(folder)) if kind.requires_logging_directory else kind("phi3v")
            tracker.start()
        except ImportError as error:
            raise InputError(f"--track {name}: {error}; install it with pip install 'phi3v[track]'") from error
        tracker.store_init_configuration(plain)
        trackers.append(tracker)
    return trackers


def speak(aloud: bool) -> None:
    """Whether this process says anything at all: one of a job does."""
    console.quiet = not aloud


def say(text: str) -> None:
    """One line to the person watching."""
    console.print(text, soft_wrap=True)
    sys.stdout.flush()
