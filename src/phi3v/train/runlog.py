"""The log of a run: `log.jsonl`, with the screen and the trackers behind it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from rich.markup import escape

from phi3v.base.console import say
from phi3v.base.files import disk_errors, flush, write_text
from phi3v.base.runfolder import RunFolder
from phi3v.model.loading import first_line
from phi3v.packing.pack import Lost
from phi3v.train.screen import Screen
from phi3v.train.trackers import Tracker


class RunLog:
    """One line a step in `log.jsonl`, and the same numbers on the screen and in the trackers. A context manager.

    Only the rank that writes gives a `folder`; elsewhere nothing is written or shown. A run that resumes after
    `first_step` keeps the lines up to there. Raises InputError when the disk refuses a line.
    """

    def __init__(
        self, folder: RunFolder | None, *, first_step: int, screen: Screen, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.file = None if folder is None else folder.log_file
        self.screen, self.trackers = screen, list(trackers)
        self._stream: TextIO | None = None
        kept = []
        if folder is not None:
            kept = _forget_after(folder, first_step)
            with disk_errors(folder.log_file):
                self._stream = open(folder.log_file, "a")  # noqa: SIM115  (closed by __exit__)
        self.screen.start_at(first_step, kept)

    @property
    def last_step(self) -> int:
        """The step that was logged last, or resumed from; 0 before the first one."""
        return self.screen.step

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
        with suppress(OSError):  # a line that did not fit on the disk: `write` has raised it
            if self._stream is not None:
                self._stream.close()
        for tracker in self.trackers:
            tracker.finish(failed=kind is not None)

    def flush(self) -> None:
        """Waits until all lines are on disk, as a checkpoint is that comes after them."""
        if self.file is not None:
            with disk_errors(self.file):
                flush(self.file)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line, shows it, and passes its numbers to the trackers."""
        self.screen.log(entry)
        if self.file is None or self._stream is None:
            return
        line = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # JSON knows no NaN and no Infinity
        with disk_errors(self.file):
            self._stream.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")
            self._stream.flush()
        place = f"eval/{entry['set']}" if "set" in entry else "eval"
        values = {**entry, **{f"{place}/{key}": value for key, value in entry.get("metrics", {}).items()}}
        numbers = {key: float(v) for key, v in values.items() if isinstance(v, int | float) and key != "step"}
        for tracker in list(self.trackers) if numbers else ():
            try:
                tracker.log(numbers, entry["step"])
            except Exception as error:  # a service, perhaps far away, raises anything: no reason to lose a run
                self.trackers.remove(tracker)
                self.complain(entry["step"], f"--track {tracker.name} fails and is left out: {first_line(error)}")

    def step(self, entry: dict[str, Any]) -> None:
        """Logs the line of a step."""
        self.write({"kind": "step", **entry})

    def complain(self, step: int, what: str, examples: Sequence[str] = ()) -> None:
        """Prints and logs that something is not as it should be."""
        names = f"; its examples are {', '.join(examples)}" if examples else ""
        say(f"[yellow]step {step}:[/] {escape(what + names)}")
        self.write({"kind": "complaint", "step": step, "what": what, "examples": list(examples)})

    def skip(self, step: int, lost: Lost) -> None:
        """Prints and logs that an example was left out of a step."""
        say(f"[yellow]step {step}:[/] {escape(f'skipped, it cannot be read: {lost}')}")
        self.write({"kind": "skip", "step": step, "example": lost.id, "where": lost.where, "reason": lost.reason})


def _forget_after(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """Removes the lines that a run resumed after `step` will write again; returns what stays.

    The final evaluation is always repeated, and from step 0 everything; complaints stay.
    """

    def stays(entry: dict[str, Any]) -> bool:
        done = 0 < step >= entry["step"] and entry.get("split") != "final"
        return done or entry["kind"] == "complaint"

    kept = [entry for entry in folder.log if stays(entry)]
    write_text(folder.log_file, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept
