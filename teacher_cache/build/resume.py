"""Take over the finished shards of a stopped build; refuse those of another one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duet_unlearn.errors import MismatchError
from duet_unlearn.teacher_cache.build.plan import PlannedRow
from duet_unlearn.teacher_cache.format.manifest import PartOf, ShardEntry
from duet_unlearn.teacher_cache.format.quarantine import find_problems
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import SHARD_FOLDER, SPLITS
from duet_unlearn.teacher_cache.format.shard import ShardFile, ShardHeader, entry_of, shard_path

logger = logging.getLogger(__name__)


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

    def shard_path(self, index: int) -> Path:
        """Return where a shard lies."""
        return shard_path(self.folder, index, len(self.shards))


def finished_shards(plan: PlannedCache) -> dict[int, ShardEntry]:
    """Return the manifest entries of the shards that are already there, by shard index.

    A damaged shard of the plan is left out, so that it is computed again and replaced. No file is
    ever deleted.

    Raises:
        MismatchError: A file under `shards/` belongs to another build, or is none of ours.
    """
    expected = {plan.shard_path(index): index for index in range(len(plan.shards))}
    entries = {}
    paths = sorted((plan.folder / SHARD_FOLDER).glob("*.parquet"))
    for path, problem in zip(paths, find_problems(paths, plan.recipe), strict=True):
        if problem is not None:
            if path not in expected:
                raise mismatch(plan.folder, [f"file {path.name}: not a shard / none"])
            logger.warning("%s; computing it again", problem)
            continue
        file = ShardFile(path)
        _refuse_other_inputs(plan, file.header)
        if expected.get(path) != file.header.index:
            raise mismatch(plan.folder, [f"file {path.name}: shard {file.header.index} / none"])
        entry = _planned_entry(plan, file)
        file.close()
        if entry is not None:
            entries[file.header.index] = entry
    return entries


def _refuse_other_inputs(plan: PlannedCache, header: ShardHeader) -> None:
    differences = header.recipe.differences(plan.recipe)
    if header.queries != plan.queries:
        differences.append(
            f"queries: {header.queries[:19]} / {plan.queries[:19]}, not the same set"
        )
    elif header.count != len(plan.shards):
        differences.append(f"number of shards: {header.count} / {len(plan.shards)} (--shard-rows)")
    if differences:
        raise mismatch(plan.folder, differences)


def _planned_entry(plan: PlannedCache, file: ShardFile) -> ShardEntry | None:
    """Return the manifest's entry of a shard, or None where it holds other rows."""
    rows = plan.shards[file.header.index]
    found = [
        (split, query_id)
        for index in range(len(file.row_group_sizes))
        for query_id, split, _ in file.read_identities(index)
    ]
    if found != [(query.split, query.query_id) for query in rows]:
        logger.warning("%s: other rows than planned; computing it again", file.path)
        return None
    return entry_of(file.path, rows_a_split(rows), max(file.row_group_sizes))


def rows_a_split(rows: Sequence[PlannedRow]) -> dict[str, int]:
    """Count the rows of each split."""
    return {split: sum(query.split == split for query in rows) for split in SPLITS}


def mismatch(folder: Path, differences: Sequence[str]) -> MismatchError:
    """Return the error for a folder that holds something else, listing what differs."""
    return MismatchError(
        f"{folder}: holds a cache of other inputs; differs (there / asked) in "
        f"{'; '.join(differences)}; choose another --out, or delete that folder"
    )
