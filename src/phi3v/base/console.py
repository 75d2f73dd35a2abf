"""What a person sees in the terminal: lines and progress bars, from one process of a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=False, highlight=False)

SECONDS_BETWEEN_LINES = 20.0
"""Without a terminal, long work prints a line this often instead of drawing a bar."""


@contextmanager
def progress_bar(
    title: str, total: int, unit: str, *, show: bool = True, summary: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a bar during long work, or a line now and then without a terminal; yield the function that advances it.

    `summary` prints at the end how long it took.
    """
    started = last_line = time.monotonic()
    done = 0
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

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bar.advance(task, count)
            due = done < total and time.monotonic() - last_line > SECONDS_BETWEEN_LINES
            if due and show and not console.is_terminal:
                last_line = time.monotonic()
                say(f"{title}: {done:,} of {total:,} {unit}")

        yield advance
    if show and summary:
        say(f"{title}: {total:,} {unit} in {time.monotonic() - started:.0f} s")


def speak(aloud: bool) -> None:
    """Whether this process says anything at all: one of a job does."""
    console.quiet = not aloud


def say(text: str) -> None:
    """One line to the person watching."""
    console.print(text, soft_wrap=True)
    sys.stdout.flush()
