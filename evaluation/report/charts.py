"""Line charts as inline SVG, in the page's own colours so that light and dark both read well."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 38
_TICKS = 5
SERIES_STYLES = 8
"""Colours that the style sheet has; further series begin again."""

Point = Sequence[float | None]


def line_chart(chart: dict[str, Any]) -> Markup:
    """Return a chart's SVG: axes with ticks, a line and dots a series; steps may lie far apart.

    Args:
        chart: `x` and `y` (what the axes say), `log` (whether y is a logarithm's), and `series`
            from names to points `[x, y]`; a y of None is left out.
    """
    series = {name: _known(points, chart["log"]) for name, points in chart["series"].items()}
    every = [point for points in series.values() for point in points]
    if not every:
        return Markup("")
    xs, ys = [x for x, _ in every], [_scaled(y, chart["log"]) for _, y in every]
    x_low, x_high = _range(min(xs), max(xs))
    y_low, y_high = _range(min(ys) if chart["log"] else min(0.0, *ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        """Pixels of a point whose y is on the axis's scale already."""
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    parts = [*_grid(place, (x_low, x_high), (y_low, y_high), log=chart["log"])]
    for at, points in enumerate(series.values()):
        places = [place(x, _scaled(y, chart["log"])) for x, y in points]
        line = " ".join(f"{x},{y}" for x, y in places)
        style = f"s{at % SERIES_STYLES}"
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(style, line))
        parts += [
            Markup(
                '<circle class="dot {}" cx="{}" cy="{}" r="2.6"><title>{}</title></circle>'
            ).format(style, px, py, f"{x:g}: {y:.4g}")
            for (px, py), (x, y) in zip(places, points, strict=True)
        ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            middle, _HEIGHT - 4, chart["x"]
        )
    )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, f"{chart['title']}: {chart['y']} by {chart['x']}", Markup("").join(parts)
    )


def _known(points: Sequence[Point], log: bool) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for x, y in points
        if x is not None and y is not None and math.isfinite(y) and (y > 0 or not log)
    ]


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _range(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _grid(
    place: Any, x_range: tuple[float, float], y_range: tuple[float, float], *, log: bool
) -> Iterator[Markup]:
    line = Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    text = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
    for value in _ticks(*y_range, whole=log):
        x, y = place(x_range[0], value)
        yield line.format(x, y, _WIDTH - _RIGHT, y)
        yield text.format(x - 6, y + 4, "end", f"{10**value:.3g}" if log else f"{value:g}")
    for value in _ticks(*x_range):
        x, y = place(value, y_range[0])
        yield text.format(x, y + 16, "middle", f"{value:g}")


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers within a range, about five of them."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    if whole and high - low >= 1:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]
