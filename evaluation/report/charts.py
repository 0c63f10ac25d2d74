"""Line charts: where points and ticks of a chart lie; the page draws them as inline SVG."""

import math
from collections.abc import Sequence
from typing import Any

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 38
_TICKS = 5
SERIES_STYLES = 8
"""Colours that the style sheet has; further series begin again."""

Point = tuple[float, float]


def make_chart(
    title: str, y: str, series: dict[str, list[Any]], *, x: str = "step", log: bool = False
) -> dict[str, Any]:
    """Return a chart as a report's content has it; each series is points `[x, y]`."""
    return {"title": title, "x": x, "y": y, "log": log, "series": series}


def lay_out(chart: dict[str, Any]) -> dict[str, Any] | None:
    """Return the pixels of a chart: axes with ticks, a line and dots a series; None without points.

    Args:
        chart: `log` (whether y is a logarithm's), and `series` from names to points `[x, y]`; a y
            of None, or without a logarithm, is left out.
    """
    log = chart["log"]
    series = [_known(points, log) for points in chart["series"].values()]
    every = [point for points in series for point in points]
    if not every:
        return None
    xs, ys = [x for x, _ in every], [_scaled(y, log) for _, y in every]
    x_low, x_high = _range(min(xs), max(xs))
    y_low, y_high = _range(min(ys) if log else min(0.0, *ys), max(ys))

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        """Pixels of a y that is on the axis's scale already."""
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_HEIGHT - _BOTTOM - up, 1)

    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "rows": [
            (down(y), f"{10**y:.3g}" if log else f"{y:g}") for y in _ticks(y_low, y_high, whole=log)
        ],
        "columns": [(across(x), f"{x:g}") for x in _ticks(x_low, x_high)],
        "lines": [
            [(across(x), down(_scaled(y, log)), f"{x:g}: {y:.4g}") for x, y in points]
            for points in series
        ],
    }


def _known(points: Sequence[Sequence[float | None]], log: bool) -> list[Point]:
    return [
        (float(x), float(y))
        for x, y in points
        if x is not None and y is not None and math.isfinite(y) and (y > 0 or not log)
    ]


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _range(low: float, high: float) -> Point:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers within a range, about five of them."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    if whole and high - low >= 1:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]
