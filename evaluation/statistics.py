"""How sure a mean or a difference is: bootstrap intervals and paired tests.

Everything is a function of the scores alone: the resamples are drawn with a fixed seed.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 100.0
LEVEL = 0.95
"""Coverage of every interval."""
_TAIL = (1 - LEVEL) / 2
RESAMPLES = 2000
_MOST_RESAMPLED = 2000
"""From so many queries on the mean is as good as normal, and resamples only cost memory."""

Scores = NDArray[np.float64]
"""One a query, 0 to 1; NaN where a measure says nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A mean over queries with its interval, in points (0 to 100)."""

    mean: float
    count: int
    """Queries that the mean is over."""
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A mean difference between two models on the same queries, in points."""

    mean: float
    count: int
    low: float
    high: float
    p: float
    """Two-sided: McNemar's exact test where every score is 0 or 1, else by flipped signs."""
    ks_p: float
    """Of the two-sample Kolmogorov-Smirnov test: do the scores have one distribution? Of the truth
    ratio (R itself, which the score cuts off at 1) on a forget set, against a model that never saw
    it, this is TOFU's forget quality (arXiv 2401.06121, section 2.2.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """How well a score tells the texts of two groups apart."""

    auc: float
    """How often one of the first group scores above one of the second, 0 to 1; ties count half."""
    low: float
    high: float
    count: int
    """Texts of the first group."""
    against: int
    """Texts of the second group."""


@functools.lru_cache(maxsize=8)
def _draws(count: int, seed: int = 0) -> NDArray[np.float64]:
    """How often each query is drawn, over `count`: `[RESAMPLES, count]`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


def summarize_all(scores: Scores) -> Number:
    """Return mean, count and interval of scores of which there are some.

    Raises:
        ValueError: There are none.
    """
    number = summarize(scores)
    if number is None:
        raise ValueError("no scores, expected at least one")
    return number


def summarize(scores: Scores) -> Number | None:
    """Return mean, count and percentile bootstrap interval; None where no query has a score."""
    known = scores[~np.isnan(scores)]
    if not known.size:
        return None
    low, high = _interval(known, lowest=0.0)
    mean = POINTS * float(known.sum() / known.size)
    return Number(mean=mean, count=known.size, low=low, high=high)


def compare(scores: Scores, against: Scores) -> Difference | None:
    """Return the mean of `scores - against` over queries that both have, with its test."""
    both = ~(np.isnan(scores) | np.isnan(against))
    first, second = scores[both], against[both]
    if not first.size:
        return None
    changes = first - second
    low, high = _interval(changes, lowest=-1.0)
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    return Difference(
        mean=POINTS * float(changes.mean()),
        count=int(changes.size),
        low=low,
        high=high,
        p=_mcnemar(changes) if binary else _sign_flip_p(changes),
        ks_p=kolmogorov_smirnov_p(first, second),
    )


def over_seeds(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Return mean and standard deviation (n - 1) of two seeds or more; None where one has none."""
    known = np.array(values, dtype=float)
    return None if np.isnan(known).any() else (float(known.mean()), float(known.std(ddof=1)))


def separate(scores: Scores, against: Scores) -> Separation:
    """Return the area under the ROC curve of two groups, with its percentile bootstrap interval.

    Both groups are drawn anew in each resample. Where one lies all above the other, every resample
    does; the interval then reaches as far as Clopper and Pearson's of the smaller group.
    """
    wins = (scores[:, None] > against) + 0.5 * (scores[:, None] == against)
    auc = float(wins.mean())
    if auc in (0.0, 1.0):
        low, high = _clopper_pearson(auc, min(scores.size, against.size))
    else:
        drawn = ((_draws(scores.size) @ wins) * _draws(against.size, seed=1)).sum(axis=1)
        low, high = np.quantile(drawn, (_TAIL, 1 - _TAIL))
    return Separation(
        auc=auc, low=float(low), high=float(high), count=scores.size, against=against.size
    )


def _clopper_pearson(share: float, count: int) -> tuple[float, float]:
    """Return the exact interval, 0 to 1, where the share is 0 or 1."""
    open_share = 1 - _TAIL ** (1 / count)
    return (0.0, open_share) if share == 0 else (1 - open_share, 1.0)


def _interval(values: Scores, lowest: float) -> tuple[float, float]:
    """Return the interval of a mean of values from `lowest` to 1, in points.

    Where all are the same, every resample is and would promise certainty; in truth 0 of 144 leaves
    2.5% of queries open (Clopper and Pearson), whose values may be any. No interval is narrower
    than that: one of 144 is no surer than none.
    """
    open_share = _clopper_pearson(0.0, values.size)[1]
    seen = (1 - open_share) * float(values.mean())
    low, high = _resampled(values)
    low, high = min(low, seen + lowest * open_share), max(high, seen + open_share)
    return POINTS * max(low, lowest), POINTS * min(high, 1.0)


def _resampled(values: Scores) -> tuple[float, float]:
    if values.size > _MOST_RESAMPLED:
        mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(values.size)
        return mean - half, mean + half
    low, high = np.quantile(_draws(values.size) @ values, (_TAIL, 1 - _TAIL))
    return float(low), float(high)


def _mcnemar(changes: Scores) -> float:
    """Exact: the queries that changed are as likely to have changed either way."""
    up, down = int((changes > 0).sum()), int((changes < 0).sum())
    changed = up + down
    ways = sum(math.comb(changed, k) for k in range(min(up, down) + 1))
    return min(1.0, 2 * ways / (1 << changed))


def _sign_flip_p(changes: Scores) -> float:
    """Fisher's randomization test: without a difference, each change is as likely the other way."""
    mean = float(changes.mean())
    if changes.size > _MOST_RESAMPLED:
        if np.ptp(changes) == 0:
            return 1.0 if mean == 0 else 1 / (RESAMPLES + 1)
        error = float(changes.std(ddof=1)) / math.sqrt(changes.size)
        return math.erfc(abs(mean) / error / math.sqrt(2))
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(RESAMPLES, changes.size))
    beyond = np.abs(signs @ changes) / changes.size >= abs(mean) - 1e-12
    return float((1 + beyond.sum()) / (RESAMPLES + 1))


def kolmogorov_smirnov_p(first: Scores, second: Scores) -> float:
    """Two-sided, by the asymptotic distribution, of two samples of the same size."""
    at = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(x), at, side="right") / x.size for x in (first, second)]
    statistic = float(np.abs(shares[0] - shares[1]).max()) * math.sqrt(first.size / 2)
    if statistic < 0.2:  # the series no longer converges, and p is 1 up to twelve digits
        return 1.0
    terms = (math.exp(-2 * (k * statistic) ** 2) * (1 if k % 2 else -1) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * sum(terms)))
