"""Curves and bars as geometry: numbers in, coordinates and labels of a small SVG out, which the templates draw.

All coordinates are in the units of the view box, WIDTH x HEIGHT, with y pointing down; the plot area is inside the
margins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 50, WIDTH - 12, 24, HEIGHT - 26
MAX_POINTS = 200
LOG_RATIO = 10  # positive values that span more than this get a logarithmic axis


Point = tuple[float, float]
Tick = tuple[float, str]
"""A coordinate and the text that stands there."""


class Series(NamedTuple):
    """One curve: `points` are (x, y), ordered by x. `style` is a class of page.css: "main", "second", "run0"."""

    label: str
    points: Sequence[Point]
    style: str = "main"


class Line(NamedTuple):
    label: str
    style: str
    path: str
    dots: list[Point]


class Reading(NamedTuple):
    """A column of the plot; while the pointer is over it, `text` and the points `dots` are shown."""

    left: float
    width: float
    x: float
    dots: list[Point]
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    last: str
    """The last value of the main curve; empty if there is none."""
    note: str
    lines: list[Line]
    levels: list[Tick]
    readings: list[Reading]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A histogram: `bars` are (x, y, width, height, title)."""

    title: str
    note: str
    bars: list[tuple[float, float, float, float, str]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points, each (last x, mean y) of equally many neighbours."""
    size = max(1, math.ceil(len(points) / limit))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], fmean(y for _, y in group)) for group in groups]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of up to `window` neighbours centred on each point; fewer at the ends, to keep them in place."""
    reaches = [min(window // 2, i, len(points) - 1 - i) for i in range(len(points))]
    return [(points[i][0], fmean(y for _, y in points[i - reach : i + reach + 1])) for i, reach in enumerate(reaches)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten inside [low, high]; only the powers of ten if these are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [factor * 10.0**d for d in decades for factor in factors if low <= factor * 10.0**d <= high]


def number(value: float) -> str:
    """A value for a person: 3 significant digits, thousands separated, tiny ones as 4e-5."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}".replace("e-0", "e-")


def percent(value: float) -> str:
    """A share as a percentage with one decimal and a space that does not break."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def chart(
    title: str,
    series: Sequence[Series],
    *,
    levels: Mapping[str, float] | None = None,
    form: Callable[[float], str] = number,
    zero: bool = False,
    note: str = "",
) -> Chart | None:
    """Lay out `series` over a common axis; None if they hold no finite point.

    levels   values to compare with, such as a baseline: horizontal lines, by name
    form     how values are written on the axis, in the reading and as the last value
    zero     the y axis starts at 0 (never logarithmic); otherwise it fits the data
    """
    finite = [one._replace(points=[point for point in one.points if math.isfinite(point[1])]) for one in series]
    drawn = [one for one in finite if one.points]
    if not drawn:
        return None
    levels = levels or {}
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points] + list(levels.values())
    low, high = min([0.0, *ys] if zero else ys), max(ys)
    logarithmic = not zero and low > 0 and high / low > LOG_RATIO
    scale: Callable[[float], float] = math.log if logarithmic else float
    bottom, top = scale(low), scale(high)
    pad = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
    bottom, top = (0.0 if zero and low == 0 else bottom - pad), top + pad
    at_x, on_y_axis = _axis(min(xs), max(xs), LEFT, RIGHT), _axis(bottom, top, BOTTOM, TOP)

    def at_y(y: float) -> float:
        return on_y_axis(scale(y))

    lines = []
    for one in drawn:
        places = [(at_x(x), at_y(y)) for x, y in one.points]
        path = "M" + "L".join(f"{x:g},{y:g}" for x, y in places)
        lines.append(Line(one.label, one.style, path, dots=places if len(places) <= 25 else []))
    main = next((one for one in drawn if one.style == "main" or len(drawn) == 1), None)
    y_ticks = log_ticks(math.exp(bottom), math.exp(top)) if logarithmic else ticks(bottom, top)
    return Chart(
        title=title,
        last=form(main.points[-1][1]) if main else "",
        note=note + (" Logarithmic axis." if logarithmic else ""),
        lines=lines,
        levels=[(at_y(value), f"{name} {form(value)}") for name, value in levels.items()],
        readings=_readings(drawn, at_x, at_y, form),
        x_ticks=[(at_x(x), number(x)) for x in ticks(min(xs), max(xs))],
        y_ticks=[(at_y(y), form(y).replace(".0\N{NO-BREAK SPACE}%", "\N{NO-BREAK SPACE}%")) for y in y_ticks],
    )


def bars(title: str, histogram: Sequence[tuple[int, int]], *, noun: str, note: str = "") -> Bars:
    """Lay out a histogram of (lowest value, count) of bins of equal width; `noun` is what is counted."""
    lows = [low for low, _ in histogram]
    width = lows[1] - lows[0] if len(lows) > 1 else 1
    first, last, most = lows[0], lows[-1] + width, max(count for _, count in histogram)

    at_x, at_y = _axis(first, last, LEFT, RIGHT), _axis(0, most, BOTTOM, TOP)
    drawn = []
    for low, count in histogram:
        values = f"{low:,}" if width == 1 else f"{low:,} to {low + width - 1:,}"
        left, right, top = at_x(low) + 1, at_x(low + width) - 1, at_y(count)
        drawn.append((left, top, round(right - left, 1), round(BOTTOM - top, 1), f"{values}: {count:,} {noun}"))
    inside = [value for value in ticks(first, last) if value == int(value)]
    middle = 0.5 if width == 1 else 0.0  # a bin of one value is labelled in its middle, a wide one at its start
    return Bars(
        title=title,
        note=note,
        bars=drawn,
        x_ticks=[(at_x(value + middle), number(value)) for value in inside if value + middle < last],
        y_ticks=[(at_y(value), number(value)) for value in ticks(0, most, 4) if value == int(value)],
    )


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The function from a value to its coordinate: `low` is at `start` and `high` at `end`, a single value between."""
    return lambda value: round(start + (end - start) * ((value - low) / (high - low) if high > low else 0.5), 1)


def _readings(
    series: Sequence[Series],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    form: Callable[[float], str],
) -> list[Reading]:
    """One column per x that any series has; neighbouring columns meet half way, so that they cover the plot."""
    values: dict[float, list[tuple[str, float]]] = {}
    for one in series:
        for x, y in one.points:
            values.setdefault(x, []).append((f"{one.label} " if len(series) > 1 else "", y))
    steps = sorted(values)
    places = [at_x(x) for x in steps]
    edges = [float(LEFT), *((a + b) / 2 for a, b in pairwise(places)), float(RIGHT)]
    readings = []
    for x, place, (left, right) in zip(steps, places, pairwise(edges), strict=True):
        text = f"step {number(x)}: " + ", ".join(f"{label}{form(y)}" for label, y in values[x])
        dots = [(place, at_y(y)) for _, y in values[x]]
        readings.append(Reading(round(left, 1), round(right - left, 1), place, dots, text))
    return readings
