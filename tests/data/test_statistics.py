from __future__ import annotations

import numpy as np

from phi3v.data.statistics import Statistics


def test_statistics() -> None:
    values = np.random.default_rng(0).integers(50, 5000, 1000)
    statistics = Statistics.of(values)
    ordered = sorted(values.tolist())
    assert (statistics.p50, statistics.p95, statistics.max) == (ordered[499], ordered[949], ordered[-1])
    assert sum(count for _, count in statistics.histogram) == 1000
    assert statistics.histogram[0][0] == ordered[0]
    lows = [low for low, _ in statistics.histogram]
    for (low, count), high in zip(statistics.histogram, [*lows[1:], 10**9], strict=True):
        assert count == ((values >= low) & (values < high)).sum()
    assert len(lows) <= 12
    assert Statistics.of([7, 7]).histogram == ((7, 2),)
