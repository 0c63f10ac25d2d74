"""Take over rows of finished caches: a row depends on recipe and query alone, not on its cache.

A new cache puts rows into another order than the caches they come from. So the rows of a window of
new shards are fetched together, in the order of the old ones: each row group is decoded once a
window, and memory holds a window, not a cache.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from duet_unlearn.data.queries import Query
from duet_unlearn.errors import MismatchError
from duet_unlearn.teacher_cache.format.manifest import Manifest
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.row_group import Identity
from duet_unlearn.teacher_cache.format.schema import CacheRow
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.reader import CacheReader

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""Which cache, and which of its rows."""

WINDOW_BYTES = 128 << 20
# A signal of T*K ids and logits, and what a prompt and a text take beside it.
_BYTES_A_LOGIT, _BYTES_A_ROW = 8, 4096
_Key = tuple[tuple[str, str] | None, float, bool, str]


def open_caches(names: Sequence[str]) -> tuple[CacheReader, ...]:
    """Open caches that have to share one recipe.

    Args:
        names: `PATH` or `PATH@sha256:DIGEST` each.

    Raises:
        CacheError: One is no finished cache.
        MismatchError: One has another recipe (the message lists what differs) or digest.
    """
    readers = tuple(CacheReader.open(name) for name in names)
    for name, reader in zip(names, readers, strict=True):
        if differences := reader.manifest.recipe.differences(readers[0].manifest.recipe):
            raise _mismatch(name, names[0], differences)
    return readers


def open_reusable(names: Sequence[str], recipe: Recipe) -> tuple[CacheReader, ...]:
    """Open caches for a new one of a recipe to take rows of.

    Prefix, its place and strength may differ where rows are left that these do not reach; what
    differs is then logged.

    Args:
        names: `PATH` or `PATH@sha256:DIGEST` each.
        recipe: That of the new cache.

    Raises:
        CacheError: One is no finished cache.
        MismatchError: No row of one can be taken (the message lists what differs), or it has
            another digest.
    """
    readers = tuple(CacheReader.open(name) for name in names)
    for name, reader in zip(names, readers, strict=True):
        if differences := what_differs(reader.manifest, recipe):
            raise _mismatch(name, "asked", differences)
        if others := reader.manifest.recipe.differences(recipe):
            logger.warning(
                "%s: taking only rows that are the same in spite of %s", name, "; ".join(others)
            )
    return readers


def what_differs(manifest: Manifest, recipe: Recipe) -> list[str]:
    """Return what keeps each row of a cache out of one of a recipe; nothing where some fit."""
    found = manifest.recipe
    held = {_key(found, split, "") for split, sums in manifest.splits.items() if sums.rows}
    if held & {_key(recipe, split, "") for split in recipe.splits}:
        return found.unsteered().differences(recipe.unsteered())
    return found.differences(recipe)


def _mismatch(name: str, wanted: str, differences: Sequence[str]) -> MismatchError:
    return MismatchError(
        f"{name}: a cache of another recipe; differs (there / {wanted}) in "
        f"{'; '.join(differences)}; leave it out, or use the recipe it was built with"
    )


def _key(recipe: Recipe, split: str, text: str) -> _Key:
    """Return what decides a row, beside what all caches that rows are taken of share."""
    steering = (recipe.prefix, recipe.prefix_place) if recipe.steers(split) else None
    strength = recipe.strength if split == "forget" else 0.0
    return steering, strength, recipe.temperature > 0 and split == "train", text


class RowSource:
    """The rows of some caches.

    Methods that read raise CorruptCacheError where a row or its shard is damaged.
    """

    def __init__(self, readers: Sequence[CacheReader]) -> None:
        self._readers = readers
        self._last = 0

    def _reader(self, number: int) -> CacheReader:
        """Return a cache; of the others little stays in memory, however many there are."""
        if number != self._last:
            self._readers[self._last].close()
            self._last = number
        return self._readers[number]

    def scan(self) -> Iterator[tuple[Place, Identity]]:
        """Yield place and identity of every row, in order; decodes no signals."""
        total = sum(reader.num_rows for reader in self._readers)
        with tqdm(total=total, desc="scan", unit=" rows", disable=None, leave=False) as progress:
            for number in range(len(self._readers)):
                for row, identity in enumerate(self._reader(number).identities()):
                    yield (number, row), identity
                    progress.update()

    def fetch(self, places: Iterable[Place]) -> dict[Place, CacheRow]:
        """Return some rows; their arrays are copies that keep no row group alive."""
        rows = {}
        for place in sorted(set(places)):
            number, row = place
            cached = self._reader(number).row(row)
            rows[place] = CacheRow(
                query_id=cached.query_id,
                split=cached.split,
                query=cached.query,
                prompt_ids=cached.prompt_ids.copy(),
                signal=Signal(**{name: getattr(cached, name).copy() for name in Signal.__slots__}),
            )
        return rows

    def engines(self, places: Iterable[Place]) -> list[dict[str, Any]]:
        """Return what computed some rows, as their shards say, each engine once."""
        groups = {(number, self._readers[number].group_of(row)): row for number, row in places}
        engines: list[dict[str, Any]] = []
        for (number, _), row in sorted(groups.items()):
            found = self._reader(number).engines_of(row)
            engines.extend(engine for engine in found if engine not in engines)
        return engines


class PlannedRows:
    """Rows of a source that go into planned shards, fetched a window of shards at a time.

    Args:
        source: Where the rows are.
        places: For each shard, the row that goes to each of its numbers.
        recipe: Says how large a row may be.
    """

    def __init__(
        self, source: RowSource, places: Mapping[int, Mapping[int, Place]], recipe: Recipe
    ) -> None:
        self._source = source
        self.places = places
        self._row_bytes = recipe.top_k * recipe.positions * _BYTES_A_LOGIT + _BYTES_A_ROW
        self._order = sorted(places)
        self._held: list[dict[int, dict[int, CacheRow]]] = []

    def take(self, shard: int) -> dict[int, CacheRow]:
        """Return the rows of a shard by their number in it; none where it takes none."""
        if not self.places.get(shard):
            return {}
        for window in self._held:
            if shard in window:
                return window.pop(shard)
        # Shards end roughly in order: with two windows none is fetched twice at their border.
        self._held = [*self._held[-1:], self._fetch_window(shard)]
        return self._held[-1].pop(shard)

    def engines(self, shard: int) -> list[dict[str, Any]]:
        """Return what computed the rows that a shard takes."""
        return self._source.engines(self.places.get(shard, {}).values())

    def _fetch_window(self, first: int) -> dict[int, dict[int, CacheRow]]:
        shards: list[int] = []
        size = 0
        for shard in self._order[bisect_left(self._order, first) :]:
            size += len(self.places[shard]) * self._row_bytes
            if shards and size > WINDOW_BYTES:
                break
            shards.append(shard)
        rows = self._source.fetch(
            place for shard in shards for place in self.places[shard].values()
        )
        return {
            shard: {number: rows[place] for number, place in self.places[shard].items()}
            for shard in shards
        }


def find_reusable(
    readers: Sequence[CacheReader],
    recipe: Recipe,
    shards: Sequence[Sequence[Query]],
    missing: Sequence[int],
) -> PlannedRows:
    """Find the rows of missing shards that other caches hold; the first that has a query wins.

    A query is known by its text, because teams number theirs differently. Its split counts where
    the recipe treats it otherwise than another: without the prefix in front of retain queries, with
    a strength, which is for forget queries, and with sampled answers, which are for training ones.
    So retain rows without the prefix are the same whatever the prefix is.

    Args:
        readers: The caches, opened for that recipe by `open_reusable`.
        recipe: The recipe of the new cache.
        shards: The queries of all its shards.
        missing: The shards whose rows are needed.

    Raises:
        CorruptCacheError: One is damaged.
    """
    source = RowSource(readers)
    places: dict[int, dict[int, Place]] = {index: {} for index in missing}
    if readers:
        wanted: dict[_Key, list[tuple[int, int]]] = {}
        for index in missing:
            for number, query in enumerate(shards[index]):
                wanted.setdefault(_key(recipe, query.split, query.text), []).append((index, number))
        for place, (_, split, text) in source.scan():
            found_in = readers[place[0]].manifest.recipe
            for index, number in wanted.pop(_key(found_in, split, text), ()):
                places[index][number] = place
            if not wanted:
                break
        found, total = sum(map(len, places.values())), sum(len(shards[index]) for index in missing)
        logger.info("%d of %d rows are taken from other caches", found, total)
    return PlannedRows(source, places, recipe)
