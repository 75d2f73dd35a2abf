"""A trace of some optimizer steps (`--profile-steps FIRST:LAST`), by PyTorch's profiler."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.markup import escape

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.files import disk_errors, make_folder


def parse_steps(text: str | None) -> range:
    """The steps of `--profile-steps`, "FIRST:LAST", counted from 1, both included; none for None. Raises InputError."""
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--profile-steps {text}: must be FIRST:LAST, such as 10:13, with 1 <= FIRST <= LAST")
    return range(int(match[1]), int(match[2]) + 1)


class Profiler(ExitStack):
    """Traces `steps` into one file per rank in `folder`. A run that ends before the last of them leaves a trace of
    those it has done."""

    def __init__(self, steps: range, folder: Path, rank: int) -> None:
        super().__init__()
        self.steps, self.folder, self.rank = steps, folder, rank
        self._traced = list[int]()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the work of a step."""
        if number not in self.steps:
            yield
            return
        if not self._traced:
            self.enter_context(torch.profiler.profile(on_trace_ready=self._export))
        self._traced.append(number)
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self.steps[-1]:
            self.close()

    def _export(self, profile: torch.profiler.profile) -> None:
        file = self.folder / f"steps-{self._traced[0]}-{self._traced[-1]}.rank-{self.rank}.json.gz"
        make_folder(self.folder)
        with disk_errors(file):
            profile.export_chrome_trace(str(file))
        say(escape(f"profile     {file}"))
