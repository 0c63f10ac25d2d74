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

    name: str
    """Module of this package and, behind a colon, the `base.Objective` in it, which takes the
    settings and the student."""
    inputs: tuple[str, ...]
    """Settings that it cannot do without."""
    settings: tuple[str, ...] = ()
    """Settings that it reads beside those and that not every objective does."""


OBJECTIVES: Mapping[str, ObjectiveKind] = MappingProxyType(
    {
        "duet": ObjectiveKind(
            name="duet:Duet",
            inputs=("cache",),
            settings=(
                *("replay", "views", "loss", "delta", "temperature", "ce_weight"),
                *("select_entropy", "top_k", "positions", "eval_cache"),
            ),
        ),
        "gradient-difference": ObjectiveKind(
            name="gradient_difference:GradientDifference", inputs=("forget", "retain")
        ),
    }
)
