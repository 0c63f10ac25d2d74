"""Take over rows of other caches: a row depends on recipe and query alone, not on its cache.

A query is known by its text, because teams number theirs differently. Its split counts only where
the recipe leaves the steering prefix out in front of retain queries.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from duet_unlearn.data.queries import Query
from duet_unlearn.teacher_cache.build.row_source import Place, PlannedRows, RowSource, open_caches
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import CacheRow

logger = logging.getLogger(__name__)


class ReusedRows:
    """Which of some planned rows other caches hold, and those rows under their new ids."""

    def __init__(
        self,
        caches: Sequence[str],
        recipe: Recipe,
        shards: Sequence[Sequence[Query]],
        missing: Sequence[int],
    ) -> None:
        """Open the caches and look for the rows of the missing shards.

        Args:
            caches: `PATH` or `PATH@sha256:DIGEST` each; the first that holds a query wins.
            recipe: The recipe of the new cache.
            shards: The queries of all its shards.
            missing: The shards whose rows are needed.

        Raises:
            CacheError: One is no finished cache, or is damaged.
            MismatchError: One has another recipe; the message lists what differs.
        """
        self._shards = shards
        self._places: dict[int, dict[int, Place]] = {index: {} for index in missing}
        source = RowSource(open_caches(caches, recipe))
        if caches:
            self._find(source, recipe)
        self._rows = PlannedRows(source, self._places, recipe)
        self.count = sum(map(len, self._places.values()))
        """Rows that need no teacher."""
        if caches:
            wanted = sum(len(shards[index]) for index in missing)
            logger.info("%d of %d queries are taken from other caches", self.count, wanted)

    def _find(self, source: RowSource, recipe: Recipe) -> None:
        def key(split: str, text: str) -> tuple[bool, str]:
            return recipe.retain_prefix or split == "forget", text

        wanted: dict[tuple[bool, str], list[tuple[int, int]]] = {}
        for index in self._places:
            for number, query in enumerate(self._shards[index]):
                wanted.setdefault(key(query.split, query.text), []).append((index, number))
        for place, (_, split, text) in source.scan():
            for index, number in wanted.pop(key(split, text), ()):
                self._places[index][number] = place
            if not wanted:
                return

    def holds(self, shard: int, number: int) -> bool:
        """Say whether a row needs no teacher."""
        return number in self._places[shard]

    def take(self, shard: int) -> dict[int, CacheRow]:
        """Return a shard's rows that need no teacher, by their number in it.

        Raises:
            CorruptCacheError: A row breaks the format's rules, or its shard is damaged.
        """
        queries = self._shards[shard]
        return {
            number: replace(row, query_id=queries[number].query_id, split=queries[number].split)
            for number, row in self._rows.take(shard).items()
        }

    def engines(self, shard: int) -> tuple[dict[str, Any], ...]:
        """Return what computed those rows."""
        return tuple(self._rows.engines(shard))
