"""What a run tells while it runs: `log.jsonl`, a progress bar, trackers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from phi3v.checkpoint import write_text
from phi3v.errors import InputError

console = Console(stderr=False, highlight=False)

# Without a terminal, a line now and then instead of a bar.
SECONDS_BETWEEN_LINES = 20.0


class RunLog:
    """One line a step in `log.jsonl`, the same numbers on the bar and to the trackers. A context manager."""

    def __init__(self, folder: Path, *, total_steps: int, first_step: int, accelerator: Any, show: bool) -> None:
        self.file = folder / "log.jsonl"
        self._forget_after(first_step)
        try:
            self._stream = open(self.file, "a")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error}") from error
        self.accelerator, self.total, self.show = accelerator, total_steps, show
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

    def _forget_after(self, step: int) -> None:
        """A run that is resumed says again what it said after its checkpoint, and scores its end again: that goes.

        A run that starts again at step 0 says everything again.
        """
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                entry = json.loads(line)
                if 0 < step >= entry["step"] and entry.get("split") != "final":
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing
                continue
        write_text(self.file, "".join(line + "\n" for line in kept))

    def __enter__(self) -> RunLog:
        self.bar.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self.bar.stop()
        with suppress(OSError):  # a line that did not fit on the disk was complained about when it was written
            self._stream.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line and passes its numbers to the trackers."""
        try:
            self._stream.write(json.dumps({**entry, "time": round(time.time(), 3)}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error}") from error
        values = {**entry, **{f"eval/{key}": value for key, value in entry.get("metrics", {}).items()}}
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=entry["step"])

    def step(self, entry: dict[str, Any]) -> None:
        """The line of a step, and its essence for the eye."""
        self.write({"kind": "step", **entry})
        rate = f"{speed:.1f}" if (speed := entry["examples_per_s"]) < 100 else f"{speed:,.0f}"
        numbers = (
            f"[dim]loss[/] {entry['loss']:.3f} [dim]lr[/] {entry['learning_rate']:.1e} {rate} [dim]ex/s[/] "
            f"{entry['tokens_per_s'] / 1000:.1f}k [dim]tok/s[/] {entry['memory_gb']:.1f} [dim]GB[/]"
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


def start_trackers(accelerator: Any, folder: Path, settings: dict[str, Any]) -> None:
    """Opens the trackers named by `--track`, with the run's settings flattened to `group/name`."""
    flat = {f"{group}/{name}": value for group, values in settings.items() for name, value in values.items()}
    plain = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in flat.items()}
    try:
        accelerator.init_trackers("phi3v", config=plain)
    except ImportError as error:
        raise InputError(f"--track: {error}; install it with pip install 'phi3v[track]'") from error


def say(text: str) -> None:
    """One line to the person watching."""
    console.print(text, soft_wrap=True)
    sys.stdout.flush()
