"""What the eye sees of a run: in a terminal of any width a screen that keeps still, elsewhere lines, or nothing."""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi3v.train import screen as room
from phi3v.train.screen import Screen, sparkline

REPOSITORY = Path(__file__).parents[2]


def step(number: int, **values: Any) -> dict[str, Any]:
    entry = {"kind": "step", "step": number, "epoch": number / 250, "loss": 4.0 / number, "learning_rate": 1.2e-3}
    entry |= {"examples_per_s": 412.3, "pages_per_s": 98.76, "tokens_per_s": 12345.0, "tflops": 0.123, "seconds": 2.0}
    return {**entry, "memory_gb": 1.5, "data_wait": 0.04, **values}


def evaluation(number: int, accuracy: float) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "metrics": {"accuracy": accuracy}, "seconds": 30.0}


def told(*entries: dict[str, Any], **how: Any) -> Screen:
    """A screen of 750 steps, evaluated every 125 and saved every 200, that has heard so much."""
    screen = Screen(
        Console(file=io.StringIO()), **{"total_steps": 750, "evaluates": 125, "saves": 200, "show": False, **how}
    )
    for entry in entries:
        screen.log(entry)
    return screen


def drawn(screen: Screen, width: int = 80, **terminal: Any) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None, record=True, file=io.StringIO(), **terminal)
    console.print(screen)
    return [line.rstrip() for line in console.export_text().splitlines()]


HALF_WAY = [*map(step, range(1, 126)), evaluation(125, 0.575), *map(step, range(126, 251)), evaluation(250, 0.55)]
HALF_WAY += map(step, range(251, 301))


def test_both_scores_are_shown_each_with_its_best_of_the_first_file() -> None:
    lines = [evaluation(number, accuracy) for number, accuracy in ((125, 0.5), (250, 0.75))]
    for line, loss in zip(lines, (0.5, 0.625), strict=True):
        line["metrics"]["loss"] = loss
    shown = drawn(told(step(250), *lines, {**evaluation(250, 0.1), "set": "hard"}))
    assert "validation loss 0.625 after step 250; best 0.500 after 125  ▁█" in shown
    assert "accuracy        75.0% after step 250" in shown


# -- in a terminal ---------------------------------------------------------------------------------------------------


def test_everything_in_80_columns() -> None:
    progress, loss, *rest = drawn(told(*HALF_WAY))
    assert re.fullmatch(r"━+[╸ ━]+ 300/750 steps  40% eta +[-\d:]+", progress)
    assert re.fullmatch(r"loss            0\.013    [▁▂▃▄▅▆▇█]{55}", loss)
    assert rest == [
        "epoch           1.20     learning rate   1.2e-03  examples/s      412.3",
        "tokens/s        12,345   TFLOP/s         0.12     memory          1.5 GB",
        "waits for data  4%",
        "next evaluation in 75 steps",
        "next checkpoint in 100 steps",
        "accuracy        55.0% after step 250; best 57.5% after 125",
    ]


def test_a_card_whose_peak_is_known_shows_mfu() -> None:
    (line,) = [line for line in drawn(told(step(1, mfu=0.413))) if "MFU" in line]
    assert "MFU             41%" in line
    assert "TFLOP" not in line


@pytest.mark.parametrize("width", [50, 79, 80, 120, 200])
def test_it_is_as_wide_as_the_terminal_and_loses_no_number(width: int) -> None:
    lines = drawn(told(*HALF_WAY), width)
    assert max(map(len, lines)) <= width
    for words in ("1.2e-03", "412", "12,345", "1.5 GB", "4%", "in 75 steps", "in 100 steps", "55.0%"):
        assert any(words in line for line in lines), words


def test_a_very_narrow_terminal_gets_what_fits_a_line_each() -> None:
    lines = drawn(told(*HALF_WAY), 24)
    assert max(map(len, lines)) <= 24
    assert len(lines) == 2 + 7 + 3  # nothing is wrapped
    assert lines[3] == "learning rate   1.2e-03"


@pytest.mark.parametrize("width", [50, 80])
def test_every_number_keeps_its_place(width: int) -> None:
    """Whatever the numbers are."""
    screen, seen = told(step(1)), list[list[str]]()
    fast, slow = {"examples_per_s": 9.5, "tokens_per_s": 90.0}, {"examples_per_s": 12345.0, "memory_gb": 140.0}
    for entry in [step(2, **fast), step(3), step(749, **slow), step(750)]:
        seen.append(drawn(screen, width))
        screen.log(entry)
    seen.append(drawn(screen, width))
    names = ("epoch", "learning rate", "examples/s", "tokens/s", "TFLOP/s", "memory", "waits for data")
    for name in (*names, "eta", "loss", "next evaluation", "next checkpoint"):
        places = {next((y, line.index(name)) for y, line in enumerate(lines) if name in line) for lines in seen}
        assert len(places) == 1, name
    assert len({len(lines) for lines in seen}) == 1


def test_before_the_first_step_nothing_is_invented() -> None:
    progress, *rest = drawn(told())
    assert re.search(r" 0/750 steps   0% eta +-:--:--$", progress)
    assert rest == ["next evaluation in 125 steps", "next checkpoint in 200 steps"]


def test_the_end_counts_as_the_last_evaluation_and_checkpoint() -> None:
    assert drawn(told(step(749)))[-2:] == ["next evaluation in 1 step", "next checkpoint in 1 step"]
    assert drawn(told(step(750)))[-2:] == ["next evaluation now", "next checkpoint now"]
    assert "next evaluation" not in "".join(drawn(told(step(1), evaluates=None)))


def test_trouble_is_counted_where_there_is_some() -> None:
    lines = drawn(told(step(1, skipped=True), {"kind": "skip", "step": 1}, {"kind": "skip", "step": 1}))
    assert "waits for data  4%       skipped steps   1        lost examples   2" in lines


def test_a_loss_that_is_no_number_is_left_out_of_the_curve() -> None:
    """As of a step skipped in fp16; a resumed run finds None for it in the log."""
    for loss, shown in ((float("inf"), "inf"), (None, "not a number")):
        lines = drawn(told(*map(step, range(1, 5)), step(5, loss=loss)))
        assert re.fullmatch(rf"loss            {shown} +█▅▂▁", lines[1])


def test_a_resumed_run_shows_its_whole_curve() -> None:
    screen = told(*HALF_WAY)
    screen.start_at(125, HALF_WAY[:126])
    lines = drawn(screen)
    assert "125/750" in lines[0]
    assert len(lines[1].split()[-1]) == 55
    assert lines[-1] == "accuracy        57.5% after step 125"


# -- its parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 10, ""),
        ([3.0], 0, ""),
        ([3.0], 10, "▁"),
        ([1.0, 1.0, 1.0], 10, "▁▁▁"),
        ([8.0, 4.0, 2.0, 1.0], 10, "█▆▃▁"),  # even steps: the scale is logarithmic
        ([3.0, 2.0, 1.0, 0.0], 10, "█▆▃▁"),  # not with a zero
        ([9.0, 7.0, 4.0, 4.0, 3.0, 1.0], 3, "█▅▁"),  # means of two
    ],
)
def test_a_sparkline(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


@pytest.mark.parametrize(("count", "width"), [(7, 3), (100, 55), (56, 55), (10_001, 79)])
def test_a_sparkline_leaves_no_value_out(count: int, width: int) -> None:
    """One that is far above the others shows, wherever it is."""
    for at in (0, count // 2, count - 1):
        values = [1.0] * count
        values[at] = 1000.0
        line = sparkline(values, width)
        assert len(line) == width
        assert line.count("█") == 1
        assert abs(line.index("█") - at * width // count) <= 1


# -- elsewhere -------------------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_line_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(room.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=80)
    with Screen(console, total_steps=9, saves=9) as screen:
        for number in range(1, 10):
            now += 0.3 * room.SECONDS_BETWEEN_LINES
            screen.log(step(number, loss=0.5, mfu=0.41, **({"skipped": True} if number == 4 else {})))
            screen.log(evaluation(number, 0.5))
    said = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in said] == ["1/9", "5/9", "9/9"]
    numbers = "learning rate 1.2e-03  examples/s 412.3  tokens/s 12,345  MFU 41%  memory 1.5 GB  waits for data 4%"
    assert said[0] == f"step 1/9  loss 0.500  epoch 0.00  {numbers}"
    assert said[1] == f"step 5/9  loss 0.500  epoch 0.02  {numbers}  skipped steps 1"


@pytest.mark.parametrize("terminal", [True, False])
def test_without_progress_there_is_none(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    with Screen(console, total_steps=9, saves=9, show=False) as screen:
        screen.log(step(9))
    assert console.file.getvalue() == ""


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Screen(console, total_steps=9, saves=9) as screen:
        screen.log(step(9))
    assert console.file.getvalue().startswith("step 9/9  loss")
    assert "\x1b" not in console.file.getvalue()


def test_what_ends_a_run_at_once_leaves_the_terminal_as_it_was() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with pytest.raises(KeyboardInterrupt), Screen(console, total_steps=9, saves=9):
        raise KeyboardInterrupt
    terminal = Terminal(80)
    terminal.feed(console.file.getvalue())
    assert terminal.cursor
    assert terminal.shown[-2:] == ["next checkpoint in 9 steps", ""]


# -- a real terminal -------------------------------------------------------------------------------------------------


class Terminal:
    """What a terminal of some width shows after so many bytes: enough of one for what rich writes."""

    TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r\n|\r|\n)|([^\x1b\r\n])")

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.x, self.y, self.cursor = width, [""], 0, 0, True

    def feed(self, text: str) -> None:
        for value, command, line_end, character in self.TOKEN.findall(text):
            if command == "A":
                self.y = max(0, self.y - int(value or 1))
            elif command == "K":
                assert value == "2", "only whole lines are erased"
                self.lines[self.y] = ""
            elif command in ("h", "l") and value == "?25":
                self.cursor = command == "h"
            elif command:
                assert command == "m", f"an unknown control sequence ends in {command}"
            elif line_end:
                self.x = 0
                self.y += "\n" in line_end
                self.lines += [""] * (self.y + 1 - len(self.lines))
            else:
                if self.x == self.width:
                    self.x, self.y = 0, self.y + 1
                    self.lines += [""] * (self.y + 1 - len(self.lines))
                line = self.lines[self.y].ljust(self.x)
                self.lines[self.y] = line[: self.x] + character + line[self.x + 1 :]
                self.x += 1

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


class Program:
    """Python code running in a terminal of its own."""

    def __init__(self, code: str, width: int) -> None:
        self.terminal, self.raw = Terminal(width), ""
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            environment.pop(name, None)
        how = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True, "env": environment}
        self.process = subprocess.Popen([sys.executable, "-c", code], **how)
        os.close(theirs)

    def read(self, until: Callable[[list[str]], bool] = lambda shown: False) -> None:
        """Goes on until the terminal shows that, or to the end."""
        decode = codecs.getincrementaldecoder("utf-8")().decode
        rest = ""
        while not until(self.terminal.shown):
            try:
                came = os.read(self.ours, 4096)
            except OSError:  # the program has ended
                return
            rest += decode(came)
            whole = rest
            if (at := rest.rfind("\x1b")) >= 0 and not Terminal.TOKEN.match(rest, at):  # half a control sequence
                whole = rest[:at]
            rest = rest[len(whole) :]
            self.raw += whole
            self.terminal.feed(whole)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def run_in() -> Iterator[Callable[[str, int], Program]]:
    """Starts a program in a terminal of some width."""
    started: list[Program] = []

    def run(code: str, width: int) -> Program:
        started.append(Program(code, width))
        return started[-1]

    yield run
    for program in started:
        program.close()


TRAINING = """
import sys, time
from phi3v.base.console import console, progress_bar, say
from phi3v.train.screen import Screen

say("before")
with Screen(console, total_steps=20, evaluates=10, saves=5) as screen:
    for number in range(1, 21):
        time.sleep(0.02)
        screen.log({"kind": "step", "step": number, "epoch": 0.1, "loss": 1 / number, "learning_rate": 1e-3,
            "examples_per_s": 1.0, "pages_per_s": 1.0, "tokens_per_s": 1.0, "tflops": 1.0, "memory_gb": 1.0,
            "data_wait": 0.0, "seconds": 0.02})
        if number % 10 == 0:
            with progress_bar("evaluating", 30, "questions", summary=False) as advance:
                for _ in range(30):
                    time.sleep(0.02)
                    advance(1)
            say(f"said after step {number}")
            screen.log({"kind": "eval", "step": number, "metrics": {"accuracy": number / 20}, "seconds": 0.6})
        if number == 13:
            print("a library warns", file=sys.stderr)
say("after")
"""


@pytest.mark.parametrize("width", [80, 50])
def test_in_a_terminal_it_stays_below_what_is_said_and_leaves_nothing_behind(
    width: int, run_in: Callable[[str, int], Program]
) -> None:
    program = run_in(TRAINING, width)
    program.read(until=lambda shown: any("evaluating" in line and "/30" in line for line in shown))
    shown = program.terminal.shown
    assert not program.terminal.cursor
    assert any("10/20 steps" in line for line in shown), "the screen stays while it is evaluated"
    program.read()
    assert program.process.wait() == 0
    assert program.terminal.cursor
    lines = [line for line in program.terminal.shown if line]
    lines = lines[lines.index("before") :]  # libraries may have said something while they were imported
    assert lines[:4] == ["before", "said after step 10", "a library warns", "said after step 20"]
    assert lines[-2:] == ["accuracy        100.0% after step 20", "after"]
    assert sum("steps" in line for line in lines) == 1, "one screen, and no bar of an evaluation"
    assert len(lines) == 4 + (8 if width == 80 else 9) + 1
    # A frame is written at once: the lines it replaces are not seen empty.
    assert program.raw.count("\x1b[2K") > 50


def test_a_real_run_in_a_terminal(
    run_in: Callable[[str, int], Program], tiny_model_dir: Path, tiny_data: Path, tmp_path
) -> None:
    """Stopped by Ctrl-C after a step, it says how to go on, below a screen that is left alone."""
    flags = [
        "train",
        "--model",
        str(tiny_model_dir),
        "--train",
        str(tiny_data),
        "--eval",
        str(tiny_data),
        "--out",
        "run",
    ]
    flags += ["--max-steps", "5000", "--batch-size", "4", "--eval-limit", "4", "--num-workers", "0", "--dtype", "fp32"]
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv[1:] = {flags!r}\nfrom phi3v.cli import main\n"
    program = run_in(code + "raise SystemExit(main())", 80)
    program.read(until=lambda shown: any(re.search(r"[1-9]\d*/5000 steps", line) for line in shown))
    os.killpg(program.process.pid, signal.SIGINT)
    program.read()
    assert program.process.wait() == 0
    assert program.terminal.cursor
    shown = program.terminal.shown
    (screen,) = [y for y, line in enumerate(shown) if "/5000 steps" in line]
    assert any(line.startswith("before training: accuracy") for line in shown[:screen])
    assert any(line.startswith("stopped after step") for line in shown[screen:])
