"""One part of a set of queries: `I/N`, so that N jobs build N small caches for `merge` to join.

A part is a cache like any other, complete in its own folder, whose manifest also says which part
of which set it is. Nothing is shared while the jobs run, and a merge can tell what is missing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from duet_unlearn.data.queries import Query
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.build.plan import order_queries

_MOST_PARTS = 99_999


@dataclass(frozen=True, order=True, slots=True)
class Part:
    """Part `number` of `count`; numbers begin with 1."""

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
