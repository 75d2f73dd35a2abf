"""The geometry of the report's curves."""

from __future__ import annotations

import pytest

from phi3v.publish.chart import Series, chart, log_ticks, number, smooth, thin, ticks


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 483) == [100, 200, 300, 400]
    assert ticks(7, 7) == [7]
    assert log_ticks(0.15, 3) == [0.2, 0.5, 1, 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4e-5, "4e-5"), (0.000286, "0.000286"), (1234.5, "1,234"), (2.5, "2.5"), (-0.25, "-0.25")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_thin_keeps_the_mean_and_the_end() -> None:
    points = [(float(x), float(x % 2)) for x in range(1, 1001)]
    thinned = thin(points, limit=250)
    assert len(thinned) == 250
    assert thinned[-1] == (1000, 0.5)
    assert thin(points[:10], limit=250) == points[:10]


def test_smooth_keeps_a_straight_line() -> None:
    line = [(float(x), 3.0 * x) for x in range(20)]
    smoothed = smooth(line, 7)
    assert [x for x, _ in smoothed] == [x for x, _ in line]
    assert [y for _, y in smoothed] == pytest.approx([y for _, y in line])
    zigzag = smooth([(float(x), float(x % 2)) for x in range(20)], 2)
    assert all(0 < y < 1 for _, y in zigzag[1:-1])


def test_chart_places_values_on_their_axis() -> None:
    drawn = chart("t", [Series(label="a", points=[(0, 0.0), (10, 10.0)])], levels={"half": 5}, zero=True)
    assert drawn is not None
    (x0, y0), (x1, y1) = drawn.lines[0].dots
    labels = {text: y for y, text in drawn.y_ticks}
    assert (y0, y1) == (labels["0"], labels["10"])
    assert y0 > y1
    assert drawn.levels[0][0] == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert [at.text for at in drawn.readings] == ["step 0: 0", "step 10: 10"]
    assert drawn.readings[0].left + drawn.readings[0].width == pytest.approx((x0 + x1) / 2)


def test_wide_positive_range_is_logarithmic() -> None:
    drawn = chart("t", [Series(label="a", points=[(0, 10.0), (1, 1.0), (2, 0.1)])])
    assert drawn is not None
    high, middle, low = (y for _, y in drawn.lines[0].dots)
    assert middle - high == pytest.approx(low - middle, abs=0.2)
    assert "Logarithmic" in drawn.note


def test_chart_of_nothing() -> None:
    assert chart("t", [Series(label="a", points=[])]) is None
    assert chart("t", [Series(label="a", points=[(1, float("nan"))])]) is None
    assert chart("t", [Series(label="a", points=[(1, 2.0)])]) is not None
