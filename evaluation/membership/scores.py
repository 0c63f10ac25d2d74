"""Membership scores: each is a function of one text and a line of the table below.

The higher, the more the model takes the text for one that it was trained on.
"""

import math
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

SHARE = 0.2
"""The least likely tokens that Min-K% and Min-K%++ look at: their papers' k = 20."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextView:
    """How a model takes one text, token by token but for the first."""

    text: str
    log_probabilities: Sequence[float]
    """Of each token in nats, given those before it."""
    means: Sequence[float]
    """Of the log-probability of a token that the model draws there: minus its entropy."""
    deviations: Sequence[float]
    """The standard deviation of the same."""

    def last(self, count: int) -> "TextView":
        """Return the view of the last tokens alone."""
        return TextView(
            text=self.text,
            log_probabilities=self.log_probabilities[-count:],
            means=self.means[-count:],
            deviations=self.deviations[-count:],
        )


def loss_score(view: TextView) -> float:
    """Score by minus the loss, the mean log-probability (Yeom et al., arXiv 1709.01604)."""
    return statistics.fmean(view.log_probabilities)


def zlib_score(view: TextView) -> float:
    """Score by the same over the text's zlib entropy in bytes (Carlini et al., arXiv 2012.07805).

    What is likely because it is simple counts less.
    """
    return loss_score(view) / len(zlib.compress(view.text.encode("utf-8", "replace")))


def min_k_score(view: TextView) -> float:
    """Score by Min-K%: the mean over the least likely tokens (Shi et al., arXiv 2310.16789)."""
    return _least(view.log_probabilities)


def min_k_plus_score(view: TextView) -> float:
    """Score by Min-K%++ (Zhang et al., arXiv 2404.02936, equation 3).

    Each token's log-probability is set against all that could have stood there, less their mean
    and over their standard deviation; the mean over the lowest.
    """
    columns = zip(view.log_probabilities, view.means, view.deviations, strict=True)
    return _least([(log - mean) / max(deviation, 1e-6) for log, mean, deviation in columns])


def _least(values: Sequence[float]) -> float:
    count = max(1, math.floor(SHARE * len(values)))
    return statistics.fmean(sorted(values)[:count])


@dataclass(frozen=True, slots=True)
class MembershipScore:
    """One way to tell members."""

    score: Callable[[TextView], float]
    description: str


SCORES: Mapping[str, MembershipScore] = MappingProxyType(
    {
        "loss": MembershipScore(loss_score, "mean log-probability of the tokens"),
        "zlib": MembershipScore(zlib_score, "the same over the text's compressed size"),
        "min_k": MembershipScore(min_k_score, "mean over the 20% least likely tokens"),
        "min_k_plus": MembershipScore(min_k_plus_score, "the same, against what could stand there"),
    }
)
"""All scores by name."""
