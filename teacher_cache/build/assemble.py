"""Write a planned cache shard by shard, and finish it with its manifest.

What `build` and `merge` share: both know which rows go where, and get the rows from elsewhere.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from duet_unlearn.data.queries import split_view
from duet_unlearn.errors import StoppedError
from duet_unlearn.files import release_claim, remove_temporary_files
from duet_unlearn.teacher_cache.build.resume import (
    PlannedCache,
    finished_shards,
    mismatch,
    rows_a_split,
)
from duet_unlearn.teacher_cache.format.card import write_card
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry
from duet_unlearn.teacher_cache.format.quarantine import remember
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER, SPLITS, CacheRow
from duet_unlearn.teacher_cache.format.shard import ShardFile, ShardHeader, write_shard
from duet_unlearn.teacher_cache.format.statistics import SplitStatistics
from duet_unlearn.teacher_cache.reader import CacheReader

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
    """The shards of a planned cache; the caller holds the folder's lock.

    Finished shards of an earlier run are kept.
    """

    def __init__(self, plan: PlannedCache) -> None:
        self.plan = plan
        self.own = range(len(plan.shards))
        """Indices of the shards."""
        remove_temporary_files(plan.folder)
        remove_temporary_files(plan.folder / SHARD_FOLDER)
        self._entries: dict[int, ShardEntry] = finished_shards(plan)
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

    def finish(
        self, teacher: str, samples: Samples, check: dict[str, Any] | None = None
    ) -> Manifest:
        """Write the card and, last of all, the manifest of a cache that has all its shards.

        Args:
            teacher: The teacher's name.
            samples: See `collect_samples`.
            check: See `Manifest.check`.

        Raises:
            CacheError: The folder cannot be written.
        """
        plan = self.plan
        totals = {split: SplitStatistics() for split in SPLITS}
        engines: list[dict[str, Any]] = []
        views: set[str | None] = set()
        for shard in self.shards:
            file = ShardFile(plan.folder / SHARD_FOLDER / shard.name)
            for split in SPLITS:
                totals[split] += file.statistics[split]
            engines.extend(engine for engine in file.header.engines if engine not in engines)
            for index in range(len(file.row_group_sizes)):
                views |= {split_view(text)[0] for _, _, text in file.read_identities(index)}
            file.close()
        manifest = Manifest(
            recipe=plan.recipe,
            teacher=teacher,
            queries=plan.queries,
            engines=tuple(engines),
            shards=self.shards,
            splits=totals,
            samples=samples,
            part=plan.part,
            check=check,
            views=tuple(sorted(view for view in views if view is not None)),
        )
        manifest = replace(manifest, digest=manifest.to_json()["digest"])
        write_card(plan.folder, manifest)
        manifest = manifest.write(plan.folder)
        remember(manifest.digest)  # its rows were checked as they were written
        release_claim(plan.folder)
        return manifest
