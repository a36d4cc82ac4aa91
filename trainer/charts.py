"""Curves as the geometry of small SVG pictures: where the lines, areas and ticks of a chart lie. Pure functions.

Our own because what is needed is small and must be one file without scripts from elsewhere: plotly, the runner-up, puts
4 MB of JavaScript into each page. Markup is the page's template; nothing here is HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

WIDTH, HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 8, 20
_MOST_POINTS = 400
_SMOOTHED_SHARE = 0.05
"""Of a run's points that the smoothed line is about a mean of."""

Values: TypeAlias = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart; None where nothing was measured. low, high: ends of an interval about each value."""

    name: str
    values: Values
    low: Values | None = None
    high: Values | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over the same x (steps). stacked: areas one above the other. log: y by powers of ten, where all values
    permit it. dots: few points, each drawn. smooth: the line is a moving average, over the values drawn faintly."""

    title: str
    xs: tuple[int, ...]
    series: tuple[Series, ...]
    unit: str = ""
    note: str = ""
    stacked: bool = False
    log: bool = False
    dots: bool = False
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class Tick:
    """at: in the picture's units."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class DrawnSeries:
    """path: of the line or area. faint: of the values under a smoothed line. points: x, y, low y, high y of dots."""

    name: str
    colour: int
    path: str
    faint: str
    points: tuple[tuple[float, float, float | None, float | None], ...]
    newest: str


@dataclass(frozen=True, slots=True)
class DrawnChart:
    """A chart ready for the page. hover: x of each point in the picture, its label, and each series' value there."""

    chart: Chart
    series: tuple[DrawnSeries, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    hover: tuple[tuple[float, str, tuple[str, ...]], ...]
    points_are_means_of: int


def draw(chart: Chart) -> DrawnChart | None:
    """The geometry of a chart; None where nothing was measured."""
    measured = tuple(s for s in chart.series if any(_is_finite(value) for value in s.values))
    if not measured:
        return None
    size = -(-len(chart.xs) // _MOST_POINTS)
    xs = tuple(chart.xs[min(i + size, len(chart.xs)) - 1] for i in range(0, len(chart.xs), size))
    series = tuple(_thinned(s, size) for s in measured)
    levels = _levels(series) if chart.stacked else tuple(s.values for s in series)
    scale = _Scale.of([*levels, *(v for s in series for v in (s.low, s.high) if v)], log=chart.log, zero=chart.stacked)
    at_x = [_x(x, xs) for x in xs]
    drawn = []
    for number, (one, level) in enumerate(zip(series, levels, strict=True)):
        points = [(x, scale.y(value)) for x, value in zip(at_x, level, strict=True)]
        if chart.stacked:
            below = levels[number - 1] if number else tuple(0.0 for _ in xs)
            path, faint = _area(points, [(x, scale.y(value)) for x, value in zip(at_x, below, strict=True)]), ""
        elif chart.dots or not chart.smooth:
            path, faint = _line(points), ""
        else:
            smooth = [(x, scale.y(value)) for x, value in zip(at_x, _smoothed(level), strict=True)]
            path, faint = _line(smooth), _line(points)
        drawn.append(
            DrawnSeries(
                name=one.name,
                colour=number,
                path=path,
                faint=faint,
                points=tuple(_points(at_x, one, scale)) if chart.dots or len(xs) == 1 else (),
                newest=figure(next(value for value in reversed(one.values) if _is_finite(value))),
            )
        )
    hover = tuple(
        (round(x, 1), str(label), tuple(figure(one.values[i]) for one in series))
        for i, (x, label) in enumerate(zip(at_x, xs, strict=True))
    )
    x_ticks = tuple(Tick(_x(x, xs), str(x)) for x in _round_steps(xs))
    return DrawnChart(chart, tuple(drawn), x_ticks, scale.ticks(), hover, size)


def figure(value: float | None) -> str:
    """A number as people read it: four digits, thousands by k, M, G; a dash for None and what is no number."""
    if value is None or not _is_finite(value):
        return "–"
    size = abs(value)
    for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, lines: Sequence[Values], *, log: bool, zero: bool) -> _Scale:
        values = [value for line in lines for value in line if value is not None and _is_finite(value)]
        low, high = min(values), max(values)
        if log and not zero and low > 0 and high / low > 20:
            return cls(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), True)
        largest = max(abs(low), abs(high))
        is_constant = high - low <= 1e-9 * largest
        if zero or (low > 0 and (low < 0.4 * high or is_constant)):
            low = 0.0
        elif not largest:
            high = 1.0
        if high - low <= 1e-9 * largest:
            low, high = low - (0.5 * largest or 1.0), high + (0.5 * largest or 1.0)
        step = _nice_step(high - low)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, False)

    def y(self, value: float | None) -> float | None:
        if value is None or not _is_finite(value):
            return None
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> tuple[Tick, ...]:
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            values = [10.0**power for power in range(first, last + 1, max((last - first) // 4, 1))]
        else:
            step = _nice_step(self.high - self.low)
            num_steps = math.floor((self.high - self.low) / step + 1e-6)  # the last may end within the picture
            values = [self.low + i * step for i in range(num_steps + 1)]
        return tuple(Tick(y, figure(0.0 if abs(v) < 1e-12 * abs(self.high) else v)) for v in values if (y := self.y(v)))


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _thinned(series: Series, size: int) -> Series:
    return Series(
        series.name,
        _means(series.values, size),
        None if series.low is None else _means(series.low, size),
        None if series.high is None else _means(series.high, size),
    )


def _means(values: Values, size: int) -> Values:
    """Of each `size` neighbours, of those that were measured."""
    if size == 1:
        return values
    means: list[float | None] = []
    for i in range(0, len(values), size):
        known = [value for value in values[i : i + size] if value is not None and math.isfinite(value)]
        means.append(sum(known) / len(known) if known else None)
    return tuple(means)


def _levels(series: Sequence[Series]) -> tuple[Values, ...]:
    """The upper edges of stacked areas."""
    total = [0.0] * len(series[0].values)
    levels: list[Values] = []
    for one in series:
        total = [below + (value or 0.0) for below, value in zip(total, one.values, strict=True)]
        levels.append(tuple(total))
    return tuple(levels)


def _smoothed(values: Values) -> Values:
    """Exponential moving average, unbiased at its start; None stays None."""
    keep = 1.0 - 1.0 / max(len(values) * _SMOOTHED_SHARE, 1.0)
    total = weight = 0.0
    smoothed: list[float | None] = []
    for value in values:
        if value is None or not math.isfinite(value):
            smoothed.append(None)
            continue
        total, weight = keep * total + value, keep * weight + 1.0
        smoothed.append(total / weight)
    return tuple(smoothed)


def _x(x: int, xs: Sequence[int]) -> float:
    share = (x - xs[0]) / (xs[-1] - xs[0]) if xs[-1] > xs[0] else 0.5
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _line(points: Sequence[tuple[float, float | None]]) -> str:
    """A path that is interrupted where nothing was measured."""
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(parts)


def _area(upper: Sequence[tuple[float, float | None]], lower: Sequence[tuple[float, float | None]]) -> str:
    return _line([*upper, *reversed(lower)]) + "Z"


def _points(
    at_x: Sequence[float], series: Series, scale: _Scale
) -> list[tuple[float, float, float | None, float | None]]:
    points = []
    for i, x in enumerate(at_x):
        y = scale.y(series.values[i])
        if y is not None:
            low = scale.y(series.low[i]) if series.low else None
            points.append((x, y, low, scale.y(series.high[i]) if series.high else None))
    return points


def _nice_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that about four steps make the span."""
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _round_steps(xs: Sequence[int]) -> list[int]:
    if len(xs) < 3:
        return list(dict.fromkeys(xs))
    step = max(round(_nice_step(xs[-1] - xs[0])), 1)
    first = -(-xs[0] // step) * step
    return list(range(first, xs[-1] + 1, step))
