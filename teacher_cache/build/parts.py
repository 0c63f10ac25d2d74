"""One part of a build: `I/N`, every N-th shard of the plan beginning with the I-th.

Several processes that share nothing but the folder build a cache together, each its own part; see
`finish` for what joins them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from duet_unlearn.errors import ConfigurationError

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

    def indices(self, shards: int) -> Sequence[int]:
        """Return the shards of this part among that many."""
        return range(self.number - 1, shards, self.count)

    @classmethod
    def of_shard(cls, index: int, count: int) -> "Part":
        """Return the part among `count` that makes a shard."""
        return cls(number=index % count + 1, count=count)
