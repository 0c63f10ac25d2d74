"""Write a planned cache shard by shard, and finish it with its manifest.

What `build` and `merge` share: both know which rows go where, and get the rows from elsewhere.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from duet_unlearn.errors import StoppedError
from duet_unlearn.teacher_cache.format.card import write_card
from duet_unlearn.files import remove_temporary_files
from duet_unlearn.teacher_cache.build.lock import remove_part_files
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry
from duet_unlearn.teacher_cache.build.parts import Part
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.build.resume import (
    PlannedCache,
    finished_shards,
    mismatch,
    rows_a_split,
)
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER, SPLITS, CacheRow
from duet_unlearn.teacher_cache.format.shard import ShardFile, ShardHeader, write_shard
from duet_unlearn.teacher_cache.format.statistics import SplitStatistics

logger = logging.getLogger(__name__)

Engines = tuple[dict[str, Any], ...]
Samples = tuple[dict[str, Any], ...]


def find_finished(plan: PlannedCache) -> Manifest | None:
    """Return the manifest of a finished cache of these inputs, None where there is none yet.

    Raises:
        MismatchError: The folder holds a finished cache of other inputs.
        CorruptCacheError: Its manifest is damaged, or a shard is missing.
    """
    if not (plan.folder / MANIFEST_NAME).exists():
        return None
    manifest = CacheReader.open(plan.folder).manifest
    differences = manifest.recipe.differences(plan.recipe)
    if manifest.queries != plan.queries:
        asked = rows_a_split([row for rows in plan.shards for row in rows])
        differences.append(
            "queries: "
            + " + ".join(f"{manifest.splits[split].rows} {split}" for split in SPLITS)
            + " / "
            + " + ".join(f"{asked[split]} {split}" for split in SPLITS)
            + ", not the same set"
        )
    if differences:
        raise mismatch(plan.folder, differences)
    return manifest


class Assembly:
    """The shards of a planned cache, or one part of them; the caller holds the lock on those.

    Finished shards of an earlier run are kept.
    """

    def __init__(self, plan: PlannedCache, part: Part | None = None) -> None:
        self.plan = plan
        count = len(plan.shards)
        self.own = part.indices(count) if part else range(count)
        """Indices of the shards that are written here."""
        if part is None:
            remove_temporary_files(plan.folder)
        # Other parts are writing theirs at the same time.
        names = {plan.shard_path(index).name for index in self.own}
        remove_temporary_files(plan.folder / SHARD_FOLDER, names if part else None)
        self._entries: dict[int, ShardEntry] = finished_shards(plan, self.own)
        self.missing = self.unfinished
        """Indices of the shards that were not there at the start."""
        self.kept_rows = sum(entry.num_rows for entry in self._entries.values())
        """Rows in the shards that were."""
        if self._entries:
            logger.info("kept %d of %d shards", len(self._entries), len(self.own))

    @property
    def unfinished(self) -> list[int]:
        """Indices of the shards that are not there now."""
        return [i for i in self.own if i not in self._entries]

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """All shards in order, once none is unfinished."""
        return tuple(self._entries[i] for i in self.own)

    def write(self, index: int, rows: Sequence[CacheRow], engines: Engines) -> None:
        """Write one shard under its final name.

        Args:
            index: Which shard.
            rows: Its rows in the plan's order.
            engines: What computed them.

        Raises:
            CacheError: A row is not storable, or the folder cannot be written.
        """
        header = ShardHeader(
            recipe=self.plan.recipe,
            queries=self.plan.queries,
            index=index,
            count=len(self.plan.shards),
            engines=engines,
        )
        self._entries[index] = write_shard(self.plan.folder, rows, header)

    def stopped(self) -> StoppedError:
        """Return the error for a user's interrupt; it says how to go on."""
        return StoppedError(
            f"stopped: {len(self._entries)} of {len(self.own)} shards are finished "
            f"in {self.plan.folder}; run the same command again, it goes on from there"
        )

    def finish(self, teacher: str, samples: Samples) -> Manifest:
        """Write the card and, last of all, the manifest.

        Raises:
            CacheError: The folder cannot be written.
        """
        plan = self.plan
        return finish_cache(plan.folder, plan.recipe, plan.queries, self.shards, teacher, samples)


def finish_cache(
    folder: Path,
    recipe: Recipe,
    queries: str,
    shards: tuple[ShardEntry, ...],
    teacher: str,
    samples: Samples,
) -> Manifest:
    """Write the card and, last of all, the manifest of a cache that has all its shards.

    Args:
        folder: The cache.
        recipe: Its recipe.
        queries: Fingerprint of its set of queries.
        shards: All shards in order.
        teacher: The teacher's name.
        samples: See `collect_samples`.

    Raises:
        CacheError: The folder cannot be written.
    """
    totals = {split: SplitStatistics() for split in SPLITS}
    engines: list[dict[str, Any]] = []
    for shard in shards:
        file = ShardFile(folder / SHARD_FOLDER / shard.name)
        for split in SPLITS:
            totals[split] += file.statistics[split]
        engines.extend(engine for engine in file.header.engines if engine not in engines)
        file.close()
    manifest = Manifest(
        recipe=recipe,
        teacher=teacher,
        queries=queries,
        engines=tuple(engines),
        shards=shards,
        splits=totals,
        samples=samples,
    )
    manifest = replace(manifest, digest=manifest.to_json()["digest"])
    write_card(folder, manifest)
    manifest = manifest.write(folder)
    remove_part_files(folder)
    return manifest
