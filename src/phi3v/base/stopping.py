"""Stopping a run after the step it is in: on SIGTERM (a spot machine is taken away), Ctrl-C, or when its time is up."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SAME_PRESS_S = 2.0
"""torchrun passes on a Ctrl-C that the terminal has sent to every process already: one press, two signals."""


class StopRequest:
    """A context manager that catches the signals; `reason` names the request to stop, or is None."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._caught: str | None = None
        self._caught_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        if self._caught is None and self.deadline is not None and time.monotonic() >= self.deadline:
            return "the time of --max-minutes is up"
        return self._caught

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        again = self._caught is not None and time.monotonic() - self._caught_at > SAME_PRESS_S
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once
        if self._caught is None:
            self._caught, self._caught_at = f"{signal.Signals(number).name} was received", time.monotonic()


class Stopped(Exception):
    """Work that can be done later was left because a stop was requested."""
