"""What the person watching a run sees: in a terminal one screen below the other output, elsewhere a line at times.

The screen shows what `log.jsonl` holds, and nothing else. It is as wide as the terminal, every number keeps its place,
and it is drawn a few times a second, however fast the steps are.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phi3v.base.console import SECONDS_BETWEEN_LINES

DRAWN_PER_SECOND = 4
STEPS_TIMED = 50
"""The time of a step is the mean over so many."""
MAX_WIDTH = 100
NAME, CELL = 16, 25
"""Characters of a name in front of its value, and of the two together."""
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


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
        self.losses, self.scores = list[float](), list[tuple[int, float, float]]()
        self.seconds = deque[float](maxlen=STEPS_TIMED)
        self.skipped = self.lost = 0
        for entry in entries:
            self._add(entry)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Takes a line of the log."""
        self._add(entry)
        now = time.monotonic()
        due = now - self._last_line > SECONDS_BETWEEN_LINES or self.step == self.total
        if self.lines and entry["kind"] == "step" and due:
            self._last_line = now
            self.console.print(self._line(), soft_wrap=True)

    def _add(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step":
            self.step, self.last = entry["step"], dict(entry)
            self.seconds.append(entry["seconds"])
            if (loss := entry["loss"]) is not None and math.isfinite(loss):
                self.losses.append(loss)
            self.skipped += entry.get("skipped", False)
        elif entry["kind"] == "eval" and "accuracy" in entry["metrics"]:
            self.scores.append((entry["step"], entry["metrics"]["accuracy"], entry["seconds"]))
        self.lost += entry["kind"] == "skip"

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def _line(self) -> str:
        """A step in one line."""
        e = self.last
        numbers = {
            "ex/s": per_second(e["examples_per_s"]),
            "pages/s": per_second(e["pages_per_s"]),
            "tok/s": thousands(e["tokens_per_s"]),
            "TFLOP/s": f"{e['tflops']:.2g}",
            **({"MFU": f"{e['mfu']:.0%}"} if "mfu" in e else {}),
            "GB": f"{e['memory_gb']:.1f}",
            "wait": f"{e['data_wait']:.0%}",
            **({"skipped": str(self.skipped)} if self.skipped else {}),
        }
        first = f"step {self.step}/{self.total}  loss {e['loss']:.3f} lr {e['learning_rate']:.1e}"
        return " ".join([first, *(f"{value} {name}" for name, value in numbers.items())])

    # -- the screen --------------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, MAX_WIDTH)
        yield Group(
            self._progress(width),
            self._curve(width, ASCII_BLOCKS if options.ascii_only else BLOCKS),
            _grid(self._numbers(), width),
            *(_row(name, value) for name, value in self._prospects()),
        )

    def _progress(self, width: int) -> Table:
        total = f"{self.total:,}"
        shown = (
            f"{self.step:>{len(total)},}/{total} steps",
            f"{self.step / self.total:>4.0%}",
            f"eta {clock(self.eta):>7}",
        )
        bar = max(4, width - sum(len(text) + 2 for text in shown))
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_row(
            ProgressBar(total=self.total, completed=self.step, width=bar),
            *(Text(text, no_wrap=True) for text in shown),
        )
        return row

    def _curve(self, width: int, blocks: str) -> Text:
        if not self.losses:
            return _row("loss", "after the first step")
        now = f"{self.last['loss']:.3f}" if self.last.get("loss") is not None else "not a number"
        text = _row("loss", f"{now:<8} ")
        return text.append(sparkline(self.losses, width - len(text), blocks), style="cyan")

    def _numbers(self) -> list[tuple[str, str]]:
        e = self.last
        numbers = [
            ("epoch", "epoch", "{:.2f}".format),
            ("learning rate", "learning_rate", "{:.1e}".format),
            ("examples/s", "examples_per_s", per_second),
            ("tokens/s", "tokens_per_s", thousands),
            ("MFU", "mfu", "{:.0%}".format) if "mfu" in e else ("TFLOP/s", "tflops", "{:.2g}".format),
            ("memory", "memory_gb", "{:.1f} GB".format),
            ("waits for data", "data_wait", "{:.0%}".format),
        ]
        shown = [(name, form(e[key]) if key in e else "–") for name, key, form in numbers]
        counts = ("skipped steps", self.skipped), ("lost examples", self.lost)
        return shown + [(name, f"{count:,}") for name, count in counts if count]

    def _prospects(self) -> list[tuple[str, str]]:
        """What comes next, and the result of the last evaluation."""
        found = [("next checkpoint", self._until(self.saves))]
        if self.evaluates is not None:
            found.insert(0, ("next evaluation", self._until(self.evaluates)))
        if self.scores:
            step, accuracy, _ = self.scores[-1]
            best, best_accuracy, _ = max(self.scores, key=lambda score: score[1])
            other = f"; best {best_accuracy:.1%} after {best:,}" if best != step else ""
            found.append(("accuracy", f"{accuracy:.1%} after step {step:,}{other}"))
        return found

    def _until(self, every: int) -> str:
        steps = min((self.step // every + 1) * every, self.total) - self.step
        if steps == 0:
            return "now"
        soon = f", {clock(seconds)}" if (seconds := self._time(steps)) is not None else ""
        return f"in {steps:,} step{'s' * (steps > 1)}{soon}"

    @property
    def eta(self) -> float | None:
        """Seconds until the last step at the present speed, with the evaluations on the way; None if unknown."""
        seconds = self._time(self.total - self.step)
        if seconds is None or self.evaluates is None or not self.scores:
            return seconds
        left = (self.total - 1) // self.evaluates - self.step // self.evaluates
        return seconds + max(0, left) * self.scores[-1][2]

    def _time(self, steps: int) -> float | None:
        return steps * sum(self.seconds) / len(self.seconds) if self.seconds else None


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """All values in at most `width` characters, each the mean of its share, from lowest to highest.

    Positive values stand on a logarithmic scale: a loss falls fast, then slowly, and the slow part should show.
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [k * len(values) // count for k in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if min(means) > 0:
        means = [math.log(mean) for mean in means]
    low, high = min(means), max(means)
    if high == low:
        return blocks[0] * count
    return "".join(blocks[round((mean - low) / (high - low) * (len(blocks) - 1))] for mean in means)


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds, with days in front where there are any."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def per_second(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def thousands(value: float) -> str:
    return f"{value / 1000:.1f}k"


def _row(name: str, value: str) -> Text:
    return Text.assemble((f"{name:<{NAME}}", "dim"), value, no_wrap=True, overflow="ellipsis")


def _grid(numbers: Sequence[tuple[str, str]], width: int) -> Text:
    """Names and values in as many columns as there is room for."""
    columns = max(1, width // CELL)
    cells = [_row(name, f"{value:<{CELL - NAME}}") for name, value in numbers]
    lines = [Text.assemble(*cells[at : at + columns]) for at in range(0, len(cells), columns)]
    for line in lines:
        line.rstrip()
    return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)
