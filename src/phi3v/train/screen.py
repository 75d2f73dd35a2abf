"""The progress of a run: one live screen below the other output in a terminal, a line now and then elsewhere.

The screen shows what `log.jsonl` holds. Every number keeps its place, and the screen is redrawn a few times a second,
however fast the steps are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.text import Text

from phi3v.base.console import SECONDS_BETWEEN_LINES

DRAWN_PER_SECOND = 4
SPEED_WINDOW_S = 600
"""The remaining time is estimated from the speed of this many seconds."""
NAME, CELL = 16, 25
"""Characters of a name in front of its value, and of the two together."""
BLOCKS = "▁▂▃▄▅▆▇█"


class Screen:
    """Shows the essence of the log while its context is open.

    `evaluates` and `saves` are the steps between two evaluations (None: there are none) and two checkpoints; after the
    last step there is one of each. Nothing is shown unless `show`.
    """

    def __init__(
        self, console: Console, *, total_steps: int, evaluates: int | None = None, saves: int, show: bool = True
    ) -> None:
        self.console, self.total, self.evaluates, self.saves = console, total_steps, evaluates, saves
        self.lines = show and not console.is_interactive
        draws = show and console.is_interactive
        self._live = Live(self, console=console, refresh_per_second=DRAWN_PER_SECOND) if draws else None
        self._last_line = 0.0
        self.start_at(0, ())

    def start_at(self, step: int, entries: Iterable[Mapping[str, Any]]) -> None:
        """The run continues after `step`, and `entries` are the lines of its log up to there."""
        self.step, self.last = step, dict[str, Any]()
        self.losses = list[float]()
        self.scores = {"validation loss": dict[int, float](), "accuracy": dict[int, float]()}
        self.skipped = self.lost = 0
        for entry in entries:
            self._add(entry)
        columns = (BarColumn(None), MofNCompleteColumn(), "steps", TaskProgressColumn(), "eta", TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, expand=True, speed_estimate_period=SPEED_WINDOW_S)
        self._task = self._bar.add_task("", total=self.total, completed=step)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Takes a line of the log."""
        self._add(entry)
        self._bar.update(self._task, completed=self.step)
        now = time.monotonic()
        due = now - self._last_line > SECONDS_BETWEEN_LINES or self.step == self.total
        if self.lines and entry["kind"] == "step" and due:
            self._last_line = now
            numbers = [f"{name} {value}" for name, value in self._numbers().items()]
            line = [f"step {self.step}/{self.total}", f"loss {self.last['loss']:.3f}", *numbers]
            self.console.print("  ".join(line), soft_wrap=True)

    def _add(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step":
            self.step, self.last = entry["step"], dict(entry)
            if (loss := entry["loss"]) is not None and math.isfinite(loss):
                self.losses.append(loss)
            self.skipped += entry.get("skipped", False)
        elif entry["kind"] == "eval" and "set" not in entry:  # of several files the first
            for name, scores in self.scores.items():
                if (score := entry["metrics"].get("loss" if name == "validation loss" else name)) is not None:
                    scores[entry["step"]] = score
        self.lost += entry["kind"] == "skip"

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bar
        if self.last:
            now = "not a number" if self.last["loss"] is None else f"{self.last['loss']:.3f}"
            text = _row("loss", f"{now:<8} ")
            yield text.append(sparkline(self.losses, options.max_width - len(text)), style="cyan")
            cells = [_row(name, value) for name, value in self._numbers().items()]
            yield Columns(cells, width=min(CELL, options.max_width), padding=0)
        if self.evaluates is not None:
            yield _row("next evaluation", self._until(self.evaluates))
        yield _row("next checkpoint", self._until(self.saves))
        for name, scores in self.scores.items():
            if scores:
                form, choose = ("{:.3f}", min) if name == "validation loss" else ("{:.1%}", max)
                step, best = list(scores)[-1], choose(scores, key=scores.__getitem__)
                other = f"; best {form.format(scores[best])} after {best:,}" if best != step else ""
                row = _row(name, f"{form.format(scores[step])} after step {step:,}{other}")
                curve = sparkline(list(scores.values()), options.max_width - len(row) - 2) if choose is min else ""
                yield row.append(f"  {curve}", style="cyan")

    def _numbers(self) -> dict[str, str]:
        """The numbers of the last step by name."""
        e = self.last
        return {
            "epoch": f"{e['epoch']:.2f}",
            "learning rate": f"{e['learning_rate']:.1e}",
            "examples/s": f"{e['examples_per_s']:,.1f}",
            "tokens/s": f"{e['tokens_per_s']:,.0f}",
            **({"MFU": f"{e['mfu']:.0%}"} if "mfu" in e else {"TFLOP/s": f"{e['tflops']:.2g}"}),
            "memory": f"{e['memory_gb']:.1f} GB",
            "waits for data": f"{e['data_wait']:.0%}",
            **({"skipped steps": str(self.skipped)} if self.skipped else {}),
            **({"lost examples": str(self.lost)} if self.lost else {}),
        }

    def _until(self, every: int) -> str:
        steps = min((self.step // every + 1) * every, self.total) - self.step
        return f"in {steps:,} step{'s' * (steps > 1)}" if steps else "now"


def sparkline(values: Sequence[float], width: int) -> str:
    """All values in at most `width` characters, each the mean of its share, from lowest to highest.

    Positive values have a logarithmic scale: a loss falls fast, then slowly, and the slow part should show.
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [k * len(values) // count for k in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if min(means) > 0:
        means = [math.log(mean) for mean in means]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def _row(name: str, value: str) -> Text:
    return Text.assemble((f"{name:<{NAME}}", "dim"), value, no_wrap=True, overflow="ellipsis")
