"""A long run does not grow: not in memory, open files, threads or processes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

SETTLED = 500  # steps, after which everything has happened that happens once
MAX_SLOPE = 1000
"""Bytes of resident memory a step. Measured were 274, and 471 with two workers (500 epochs, 1,000 processes), from a
heap that splinters: tracemalloc finds 24 bytes a step in Python's objects. One pack that stays would be 700,000."""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_thousand_steps_leave_nothing_behind(workers: int, night: Any, tmp_path: Path) -> None:
    record = tmp_path / "measured"
    flags = {"max_steps": 2000, "save_every_steps": 100, "eval_every_steps": 250, "num_workers": workers}
    status, said = night.run(tmp_path / "run", ["measured", record, 10], **flags)
    assert status == 0, said
    found = [json.loads(line) for line in record.read_text().splitlines()]
    assert [one["step"] for one in found] == [*range(10, 2001, 10)]
    settled = [one for one in found if one["step"] > SETTLED]
    for name in ("files", "threads", "children"):
        assert len({one[name] for one in settled}) == 1, name
    assert settled[0]["children"] == workers
    # Thirds, by their medians: malloc gives a pack back now and then, and takes it again.
    early, late = (median(one["rss"] for one in settled[part]) for part in (slice(0, 50), slice(100, 150)))
    slope = (late - early) / 1000
    print(
        f"{workers} workers: {early / 1e6:.1f} MB, {slope:+.0f} bytes a step from step 750 to 1,750; "
        f"{settled[0]['files']} files, {settled[0]['threads']} threads, {workers} children all the time"
    )
    assert slope < MAX_SLOPE
