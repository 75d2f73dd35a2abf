"""What a run records while it trains: `log.jsonl`, from which the screen and the trackers are fed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.markup import escape

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.files import disk_errors, flush, write_text
from phi3v.model.loading import first_line
from phi3v.packing.pack import Lost
from phi3v.train.screen import Screen
from phi3v.train.trackers import Tracker


class RunLog:
    """One line a step in `log.jsonl`, the same numbers on the screen and to the trackers. A context manager.

    Only the rank that writes has one with a file; elsewhere `folder` is None and nothing is written or shown.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        first_step: int,
        screen: Screen,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.file = None if folder is None else folder / "log.jsonl"
        self.screen, self.trackers = screen, list(trackers)
        self._stream: TextIO | None = None
        self._open(first_step, fresh=first_step == 0)  # a run that starts at step 0 says everything again

    def _open(self, step: int, *, fresh: bool = False) -> None:
        kept = [] if self.file is None else self._forget_after(self.file, -1 if fresh else step)
        self.screen.start_at(step, kept)
        if self.file is None:
            return
        try:
            self._stream = open(self.file, "a")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error}") from error

    def flush(self) -> None:
        """Waits until all lines are on disk, as a checkpoint is that comes after them."""
        if self.file is not None:
            with disk_errors(self.file):
                flush(self.file)

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
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
        with suppress(OSError):  # a line that did not fit on the disk was complained about when it was written
            if self._stream is not None:
                self._stream.close()
        for tracker in self.trackers:
            tracker.finish(failed=kind is not None)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line, shows it, and passes its numbers to the trackers."""
        self.screen.hear(entry)
        if self._stream is None:
            return
        line = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # JSON knows no NaN and no Infinity
        try:
            self._stream.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error}") from error
        values = {**entry, **{f"eval/{key}": value for key, value in entry.get("metrics", {}).items()}}
        numbers = {key: float(v) for key, v in values.items() if isinstance(v, int | float) and key != "step"}
        for tracker in list(self.trackers) if numbers else ():
            try:
                tracker.log(numbers, entry["step"])
            except Exception as error:  # its service, perhaps far away: no reason to lose a run
                self.trackers.remove(tracker)
                self.complain(entry["step"], f"--track {tracker.name} fails, it is told no more: {first_line(error)}")

    def complain(self, step: int, what: str, examples: Sequence[str] = ()) -> None:
        """Says, and keeps, that something was not as it should be."""
        of = f"; its examples are {', '.join(examples)}" if examples else ""
        say(f"[yellow]step {step}:[/] {escape(what + of)}")
        self.write({"kind": "complaint", "step": step, "what": what, "examples": list(examples)})

    def skip(self, step: int, lost: Lost) -> None:
        """Says, and keeps, that an example was left out of a step."""
        say(f"[yellow]step {step}:[/] {escape(f'skipped, it cannot be read: {lost}')}")
        self.write({"kind": "skip", "step": step, "example": lost.id, "where": lost.where, "reason": lost.reason})

    def step(self, entry: dict[str, Any]) -> None:
        """The line of a step."""
        self.write({"kind": "step", **entry})
