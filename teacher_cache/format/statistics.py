"""What a cache's signals look like on average: mass that the Top-K covers, and entropy."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pydantic

from duet_unlearn.teacher_cache.format.row_group import RowGroup
from duet_unlearn.teacher_cache.format.schema import SPLITS, CacheRow
from duet_unlearn.teacher_cache.format.strict_json import Count, with_entries

# A writer may sum before or after it rounds logits to float16.
_ROUNDING = 0.02
_Sum = Annotated[float, pydantic.Field(strict=True, ge=0, lt=1e18)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitStatistics:
    """Sums over the rows of one split; means follow from them."""

    rows: Count = 0
    """Queries."""
    positions: Count = 0
    """Positions of all those queries."""
    mass: _Sum = 0.0
    """Sum over positions of the probability that the Top-K tokens hold together."""
    entropy: _Sum = 0.0
    """Sum over positions of the entropy in nats, the rest beyond the Top-K as one outcome: a
    lower bound of the full entropy, and close to it where the mass is."""

    def __add__(self, other: "SplitStatistics") -> "SplitStatistics":
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        return SplitStatistics(**sums)

    def agrees_with(self, other: "SplitStatistics") -> bool:
        """Say whether counts are the same and sums are up to the rounding of stored logits."""
        return (self.rows, self.positions) == (other.rows, other.positions) and all(
            math.isclose(mine, theirs, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
            for mine, theirs in ((self.mass, other.mass), (self.entropy, other.entropy))
        )

    def summary(self) -> str:
        """Return all four as a phrase."""
        return (
            f"{self.rows} rows, {self.positions} positions, mass {self.mass:.4g}, entropy "
            f"{self.entropy:.4g}"
        )


SplitSums = Annotated[
    dict[str, Annotated[SplitStatistics, with_entries(*SplitStatistics.__dataclass_fields__)]],
    with_entries(*SPLITS[:2], also=SPLITS[2:]),
]
"""The sums of every split, untrusted."""


def signal_statistics(
    logits: npt.NDArray[np.float32], logsumexp: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mass of the Top-K and the entropy in nats, each `[T]`.

    Args:
        logits: Raw Top-K logits, `[T, K]`, minus infinity in empty places.
        logsumexp: Over the full vocabulary, `[T]`.
    """
    # Logits of an untrusted cache may be absurd; what comes out is then no number, and agrees with
    # none.
    with np.errstate(all="ignore"):
        log_probabilities = logits.astype(np.float64) - logsumexp.astype(np.float64)[:, None]
        probabilities = np.exp(log_probabilities)
        mass = probabilities.sum(axis=1)
        # Rounding of the stored logits can lift the sum a little above one.
        rest = np.clip(1.0 - mass, 0.0, 1.0)
        tail = -rest * np.log(np.where(rest > 0, rest, 1.0))
        shares = probabilities * np.where(probabilities == 0, 0.0, log_probabilities)
        entropy = -shares.sum(axis=1) + tail
    return np.minimum(mass, 1.0), np.maximum(entropy, 0.0)


def group_statistics(group: RowGroup) -> dict[str, SplitStatistics]:
    """Return the sums of a decoded row group, a split."""
    mass, entropy = signal_statistics(group.logits.astype(np.float32), group.logsumexp)
    lengths = np.diff(group.response_offsets)
    codes = np.repeat(group.split_codes, lengths)
    return {
        split: SplitStatistics(
            rows=int((group.split_codes == code).sum()),
            positions=int((codes == code).sum()),
            mass=float(mass[codes == code].sum()),
            entropy=float(entropy[codes == code].sum()),
        )
        for code, split in enumerate(SPLITS)
    }


def rows_statistics(
    rows: Iterable[CacheRow], logit_dtype: str = "float32"
) -> dict[str, SplitStatistics]:
    """Return the sums of some rows, a split, with logits as they are stored."""
    totals = {split: SplitStatistics() for split in SPLITS}
    for row in rows:
        mass, entropy = signal_statistics(
            row.signal.logits.astype(logit_dtype), row.signal.logsumexp
        )
        totals[row.split] += SplitStatistics(
            rows=1, positions=len(mass), mass=float(mass.sum()), entropy=float(entropy.sum())
        )
    return totals
