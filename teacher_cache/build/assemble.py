"""Write a planned cache shard by shard, and finish it with its manifest.

What `build` and `merge` share: both know which rows go where, and get the rows from elsewhere.
Finished shards of a stopped run are taken over, those of another cache refused.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from duet_unlearn.data.messages import split_view
from duet_unlearn.errors import CorruptCacheError, MismatchError, StoppedError
from duet_unlearn.files import release_claim, remove_temporary_files
from duet_unlearn.teacher_cache.build.plan import PlannedRow
from duet_unlearn.teacher_cache.build.row_source import what_differs
from duet_unlearn.teacher_cache.format.card import write_card
from duet_unlearn.teacher_cache.format.manifest import (
    Manifest,
    PartOf,
    ShardEntry,
    check_shards,
    read_manifest,
)
from duet_unlearn.teacher_cache.format.quarantine import find_problems, remember
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER, CacheRow
from duet_unlearn.teacher_cache.format.shard import (
    ShardFile,
    ShardHeader,
    entry_of,
    shard_path,
    write_shard,
)
from duet_unlearn.teacher_cache.format.statistics import SplitStatistics
from duet_unlearn.teacher_cache.reader import CacheReader

logger = logging.getLogger(__name__)

_HINT = " (build --reuse takes over the rows that stay the same)"
Engines = tuple[dict[str, Any], ...]
Samples = tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCache:
    """A cache that is being built: what every shard of it must say and hold."""

    folder: Path
    recipe: Recipe
    queries: str
    """Fingerprint of the set of queries."""
    shards: tuple[tuple[PlannedRow, ...], ...]
    """The rows of each shard, in order."""
    part: PartOf | None = None
    """Which part of a larger set the queries are, if they are one."""


def find_finished(plan: PlannedCache) -> Manifest | None:
    """Return the manifest of a finished cache of these inputs, None where there is none yet.

    Raises:
        MismatchError: The folder holds a finished cache of other inputs.
        CorruptCacheError: Its manifest is damaged, or a shard is missing.
    """
    if not (plan.folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(plan.folder)
    differences = manifest.recipe.differences(plan.recipe)
    reuse = "" if what_differs(manifest, plan.recipe) else _HINT
    if manifest.queries != plan.queries:
        there = {split: sums.rows for split, sums in manifest.splits.items()}
        asked = _rows_a_split([row for rows in plan.shards for row in rows], plan.recipe)
        found, wanted = (
            " + ".join(f"{count} {split}" for split, count in rows.items())
            for rows in (there, asked)
        )
        differences.append(f"queries: {found} / {wanted}, not the same set")
    if differences:
        raise _mismatch(plan, differences, reuse)
    try:
        CacheReader.open(plan.folder)
    except CorruptCacheError as error:
        raise CorruptCacheError(
            f"{error}, or remove {plan.folder / MANIFEST_NAME} and run the same command again: it "
            "keeps the sound shards"
        ) from error
    return manifest


class Assembly:
    """The shards of a planned cache; the caller holds the folder's lock.

    Raises:
        MismatchError: A file under `shards/` belongs to another build, or is none of ours.
    """

    def __init__(self, plan: PlannedCache) -> None:
        self.plan = plan
        remove_temporary_files(plan.folder)
        remove_temporary_files(plan.folder / SHARD_FOLDER)
        self._entries = _finished_shards(plan)
        self.missing = self.unfinished
        """Indices of the shards that were not there at the start."""
        self.kept_rows = sum(entry.num_rows for entry in self._entries.values())
        """Rows in the shards that were."""
        if self._entries:
            logger.info("kept %d of %d shards", len(self._entries), len(plan.shards))

    @property
    def unfinished(self) -> list[int]:
        """Indices of the shards that are not there now."""
        return [index for index in range(len(self.plan.shards)) if index not in self._entries]

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """All shards in order, once none is unfinished."""
        return tuple(self._entries[index] for index in range(len(self.plan.shards)))

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
        """Return the error for a user's interrupt; it says how to resume."""
        return StoppedError(
            f"stopped: {len(self._entries)} of {len(self.plan.shards)} shards are finished "
            f"in {self.plan.folder}; run the same command again to resume"
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
            CacheError: The folder cannot be written, or no reader would take so many row groups.
        """
        plan = self.plan
        totals = {split: SplitStatistics() for split in plan.recipe.splits}
        engines: list[dict[str, Any]] = []
        views: set[str | None] = set()
        for shard in self.shards:
            file = ShardFile(plan.folder / shard.path)
            for split in totals:
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
        check_shards(manifest)
        manifest = replace(manifest, digest=manifest.to_json()["digest"])
        write_card(plan.folder, manifest)
        manifest = manifest.write(plan.folder)
        remember(manifest.digest)  # its rows were checked as they were written
        release_claim(plan.folder)
        return manifest


def _finished_shards(plan: PlannedCache) -> dict[int, ShardEntry]:
    """Return the manifest entries of the shards that are already there, by shard index.

    A damaged shard of the plan is left out, so that it is computed again and replaced. No file is
    ever deleted.
    """
    count = len(plan.shards)
    expected = {shard_path(plan.folder, index, count): index for index in range(count)}
    entries = {}
    paths = sorted((plan.folder / SHARD_FOLDER).glob("[!.]*.parquet"))
    problems = find_problems(paths, plan.recipe, queries=plan.queries)
    for path, problem in zip(paths, problems, strict=True):
        if problem is not None:
            if path not in expected:
                raise _mismatch(plan, [f"file {path.name}: not a shard / none"])
            logger.warning("%s; computing it again", problem)
            continue
        file = ShardFile(path)
        header = file.header
        differences = header.recipe.differences(plan.recipe)
        if header.queries != plan.queries:
            differences.append(
                f"queries: {header.queries[:19]} / {plan.queries[:19]}, not the same set"
            )
        elif header.count != count:
            differences.append(f"number of shards: {header.count} / {count} (--shard-rows)")
        elif not differences and expected.get(path) != header.index:
            differences.append(f"file {path.name}: shard {header.index} / none")
        if differences:
            raise _mismatch(plan, differences)
        if _has_planned_rows(file, plan.shards[header.index]):
            rows = _rows_a_split(plan.shards[header.index], plan.recipe)
            entries[header.index] = entry_of(path, rows, max(file.row_group_sizes))
        file.close()
    return entries


def _has_planned_rows(file: ShardFile, rows: Sequence[PlannedRow]) -> bool:
    """Say whether a shard holds these rows."""
    found = [
        (split, query_id)
        for index in range(len(file.row_group_sizes))
        for query_id, split, _ in file.read_identities(index)
    ]
    if found != [(row.split, row.query_id) for row in rows]:
        logger.warning("%s: other rows than planned; computing it again", file.path)
        return False
    return True


def _rows_a_split(rows: Sequence[PlannedRow], recipe: Recipe) -> dict[str, int]:
    return {split: sum(row.split == split for row in rows) for split in recipe.splits}


def _mismatch(plan: PlannedCache, differences: Sequence[str], reuse: str = "") -> MismatchError:
    return MismatchError(
        f"{plan.folder}: holds a cache of other inputs; differs (there / asked) in "
        f"{'; '.join(differences)}; choose another --out{reuse}, or delete that folder"
    )
