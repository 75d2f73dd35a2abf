"""A long run does not grow: not in memory, open files, threads or processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SETTLED = 500  # steps, after which everything has happened that happens once
MAX_SLOPE = 400  # bytes of resident memory a step; see the figures that the test prints


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
    steps, memory = (np.array([one[name] for one in settled], dtype=float) for name in ("step", "rss"))
    slope, start = np.polyfit(steps, memory, 1)
    noise = float(np.std(memory - (slope * steps + start)))
    print(
        f"{workers} workers: {memory[0] / 1e6:.1f} MB, {slope:+.0f} bytes a step over {len(settled) * 10} steps "
        f"(residuals {noise / 1e3:.0f} kB), {settled[0]['files']} files, {settled[0]['threads']} threads"
    )
    assert slope < MAX_SLOPE
