"""Which query goes into which shard: a pure function of the set of queries.

The order of the query files does not matter, so the same set always gives the same shards, and a
stopped build finds its finished shards again.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from duet_unlearn.data.queries import VIEW_MARK, Query
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.format.manifest import MAX_MANIFEST_BYTES
from duet_unlearn.teacher_cache.format.schema import MAX_ROWS, SPLITS

_MAX_LIST_ENTRIES = 2**31 - 1
_MOST_PARTS = 99_999
MOST_SHARDS = MAX_MANIFEST_BYTES // 400
"""An entry of the manifest takes 350 bytes at most."""


class PlannedRow(Protocol):
    """A row before its signal is there: a query, or a row of another cache."""

    @property
    def query_id(self) -> str:
        """Its id in the new cache."""

    @property
    def split(self) -> str:
        """`forget`, `retain` or `train`."""


Row = TypeVar("Row", bound=PlannedRow)


def plan_shards(queries: Iterable[Row], shard_rows: int) -> list[list[Row]]:
    """Spread queries over shards of `shard_rows`.

    Every shard holds the splits in the proportion of the whole set, so that a reader mixes them
    from any one shard; within a shard they stand in the order of `SPLITS`.

    Raises:
        ConfigurationError: No reader would take a cache of so many rows or shards.
    """
    merged = order_queries(queries)
    if len(merged) > MAX_ROWS:
        raise ConfigurationError(
            f"{len(merged)} rows, and a cache holds at most {MAX_ROWS}; make several"
        )
    if len(merged) > MOST_SHARDS * shard_rows:
        raise ConfigurationError(
            f"shard_rows is {shard_rows}, so that {len(merged)} rows would be more than "
            f"{MOST_SHARDS} shards; give at least {-(-len(merged) // MOST_SHARDS)}"
        )
    return [
        sorted(merged[start : start + shard_rows], key=lambda query: SPLITS.index(query.split))
        for start in range(0, len(merged), shard_rows)
    ]


def order_queries(queries: Iterable[Row]) -> list[Row]:
    """Return the queries in an order of their own ids, any stretch of it holding both splits.

    Shuffled by a hash of the id: ids of one topic begin alike, and training, which mixes only a few
    row groups at a time, would see one topic after the other. What a query has in views stays
    beside it.
    """
    ordered = sorted(queries, key=lambda query: (_place(query.query_id), query.query_id))
    merged = np.empty(0, np.int64)
    for split in SPLITS:
        rows = [row for row, query in enumerate(ordered) if query.split == split]
        merged = merge_in_proportion(merged, np.array(rows, np.int64))
    return [ordered[row] for row in merged]


def _place(query_id: str) -> bytes:
    """Return a hash of a query's id, the same for the query in a view."""
    return hashlib.sha256(query_id.partition(VIEW_MARK)[0].encode()).digest()


def merge_in_proportion(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Spread two sequences evenly over one, each in its own order (Bresenham's line)."""
    total = len(first) + len(second)
    steps = np.arange(total + 1, dtype=np.int64) * len(first) // max(total, 1)
    is_first = np.diff(steps) == 1
    merged = np.empty(total, np.int64)
    merged[is_first] = first
    merged[~is_first] = second
    return merged


def check_shard_rows(shard_rows: int, top_k: int, positions: int) -> None:
    """Check that a shard of that many rows can be written.

    Raises:
        ConfigurationError: There are no rows, or more list entries than a Parquet column holds.
    """
    most = _MAX_LIST_ENTRIES // (top_k * positions)
    if not 1 <= shard_rows <= most:
        raise ConfigurationError(
            f"shard_rows is {shard_rows}, expected 1 to {most} with --top-k {top_k} and "
            f"--positions {positions}"
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` of `count` of a set of queries; numbers begin with 1.

    N jobs build N small caches that `merge` joins. Nothing is shared while they run: a part is a
    cache like any other, whose manifest also says which part of which set it is.
    """

    count: int
    number: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read `I/N`.

        Raises:
            ConfigurationError: It is not that, or I is not 1 to N.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None:
            raise ConfigurationError(
                f"part {text!r}: expected I/N such as 1/8, the first of eight parts"
            )
        number, count = map(int, match.groups())
        if not 1 <= number <= count <= _MOST_PARTS:
            raise ConfigurationError(
                f"part {text}: parts are numbered from 1 to N (at most {_MOST_PARTS}), so eight of "
                "them are 1/8 to 8/8; for a Slurm array that is --array=1-8"
            )
        return cls(number=number, count=count)

    def select(self, queries: Sequence[Query]) -> list[Query]:
        """Return the queries of this part: a stretch of the plan's order, splits in proportion.

        Raises:
            ConfigurationError: There are fewer queries than parts.
        """
        ordered = order_queries(queries)
        if len(ordered) < self.count:
            raise ConfigurationError(
                f"part {self}: {len(ordered)} queries cannot be cut into {self.count} parts; give "
                "fewer parts"
            )
        start, stop = (len(ordered) * n // self.count for n in (self.number - 1, self.number))
        return ordered[start:stop]
