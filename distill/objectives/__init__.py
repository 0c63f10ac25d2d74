"""What a student can be trained for: one file and one line of `OBJECTIVES` each.

The trainer keeps the order of rows, their weights in a step, the checks, checkpoints and resuming.
An objective (`base.Objective`) has its examples, their collation and its loss for each row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveKind:
    """An objective that `--objective` offers, before anything heavy is imported."""

    module: str
    """Of this package; its `open_objective(config, student)` returns the `base.Objective`."""
    inputs: tuple[str, ...]
    """Settings that it cannot do without."""
    settings: tuple[str, ...] = ()
    """Settings that it reads beside those and that not every objective does."""


OBJECTIVES: Mapping[str, ObjectiveKind] = MappingProxyType(
    {
        "duet": ObjectiveKind(
            module="duet",
            inputs=("cache",),
            settings=(
                *("replay", "views", "loss", "delta", "temperature", "ce_weight"),
                *("select_entropy", "top_k", "positions", "eval_cache"),
            ),
        ),
        "gradient-difference": ObjectiveKind(
            module="gradient_difference", inputs=("forget", "retain")
        ),
    }
)
