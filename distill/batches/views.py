"""Training views and how often each is drawn.

A source is what `--view` takes: a file, a built-in view or a group, with `=WEIGHT` behind it where
its views are to be drawn more or less often than others (`@remember=3`). A line of a file may have
a weight of its own (`[weight 3] ...`); the two multiply. Weights count against each other: a view
of weight 3 is drawn three times as often as one of weight 1.
"""

import dataclasses
import math
from collections.abc import Sequence

from duet_unlearn.data.shape_catalogue import shape_of
from duet_unlearn.data.shapes import Shape, load_shapes
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.files import user_path

NO_VIEWS = "none"
"""In place of a source: plain queries alone, whatever the cache holds."""


def load_views(sources: Sequence[str], cached: Sequence[str] = ()) -> tuple[Shape, ...]:
    """Return the views of all sources, each text once; named again, it takes the later weight.

    Args:
        sources: What `--view` took.
        cached: Texts of the shapes in which the cache holds retain queries; without a source, they
            are the views.

    Raises:
        ConfigurationError: A built-in name is unknown, or a weight is not above 0.
        DataError: A file is missing, unreadable or malformed.
    """
    if NO_VIEWS in sources and len(sources) > 1:
        raise ConfigurationError(f"view {NO_VIEWS} stands beside others; give it alone or leave it")
    if not sources:
        return tuple(shape_of(text) for text in cached)
    views: dict[str, Shape] = {}
    for source in sources:
        if source == NO_VIEWS:
            return ()
        name, weight = _split_weight(source)
        for view in load_shapes(name):
            weighted = dataclasses.replace(view, weight=view.weight * weight)
            first = views.get(view.text, view)
            views[view.text] = dataclasses.replace(weighted, name=first.name)
    return tuple(views.values())


def _split_weight(source: str) -> tuple[str, float]:
    name, equals, text = source.rpartition("=")
    # An equals sign may stand in a file's name.
    if not equals or user_path(source, "view").exists():
        return source, 1.0
    try:
        weight = float(text)
    except ValueError:
        if not name.startswith("@"):
            return source, 1.0  # a file that is missing; reading it says so
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigurationError(f"view {source}: weight {text!r}, expected a number above 0")
    return name, weight


def draw_weights(views: Sequence[Shape]) -> tuple[float, ...] | None:
    """Return the weights, the smallest of them 1, or None where all are equal."""
    smallest = min((view.weight for view in views), default=1.0)
    weights = tuple(view.weight / smallest for view in views)
    return None if all(math.isclose(weight, 1.0) for weight in weights) else weights


def describe_views(views: Sequence[Shape]) -> str:
    """Return the views' names, with their shares of the draws where those differ."""
    weights = draw_weights(views)
    if weights is None:
        return ", ".join(view.name for view in views) or "none"
    total = sum(weights)
    return ", ".join(
        f"{view.name} ({weight / total:.0%})" for view, weight in zip(views, weights, strict=True)
    )
