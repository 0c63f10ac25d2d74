"""Check every byte and every row of a finished cache, and name the shard that is bad."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from duet_unlearn.data.queries import fingerprint_hashes, hash_row
from duet_unlearn.errors import CorruptCacheError
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry
from duet_unlearn.teacher_cache.format.quarantine import ensure_sound
from duet_unlearn.teacher_cache.format.row_group import Identity, row_group_problems, text_key
from duet_unlearn.teacher_cache.format.schema import SHARD_FOLDER, SPLITS
from duet_unlearn.teacher_cache.format.statistics import SplitStatistics, group_statistics
from duet_unlearn.teacher_cache.reader import check_bytes, open_shard, read_pinned
from duet_unlearn.urls import is_url


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a verification found."""

    manifest: Manifest
    problems: tuple[str, ...]
    """One line for each bad shard or contradiction; empty for a sound cache."""
    rows: int
    """Rows that were checked."""


def verify(cache: str | Path) -> VerifyReport:
    """Check a cache against its manifest and the format's rules.

    Goes on after a bad shard, so that all of them are named. Of a URL every byte is read anew, a
    shard at a time.

    Raises:
        CacheError: There is no finished cache, its manifest is damaged, or it cannot be read.
        MismatchError: The cache has another digest than the one given.
    """
    if isinstance(cache, str) and is_url(cache):
        from duet_unlearn.teacher_cache.share.remote import open_afresh

        with open_afresh(cache) as shards:
            report = _verify(shards.folder, shards.manifest, shards.names(), shards.for_a_while)
            url = shards.store.url
            problems = (problem.replace(str(shards.folder), url) for problem in report.problems)
            return dataclasses.replace(report, problems=tuple(problems))
    folder, manifest = read_pinned(cache)
    # What begins with a dot is no part of a cache: a stopped push leaves such files.
    names = {path.name for path in (folder / SHARD_FOLDER).glob("[!.]*")}
    return _verify(folder, manifest, names, lambda _: contextlib.nullcontext())


def _verify(
    folder: Path,
    manifest: Manifest,
    names: set[str],
    have: Callable[[ShardEntry], contextlib.AbstractContextManager[None]],
) -> VerifyReport:
    problems = [
        f"{folder / SHARD_FOLDER / name}: not listed in the manifest; remove it"
        for name in sorted(names - {shard.name for shard in manifest.shards})
    ]
    totals = {split: SplitStatistics() for split in SPLITS}
    # Hashes, not texts: documents would fill the memory.
    hashes: list[bytes] = []
    ids: set[bytes] = set()
    for entry in tqdm(manifest.shards, desc="verify", unit=" shards", disable=None):
        try:
            with have(entry):
                statistics, rows = _check_shard(folder, entry, manifest)
        except CorruptCacheError as error:
            problems.append(str(error))
            continue
        hashes.extend(map(hash_row, rows))
        ids.update(text_key(split, query_id) for query_id, split, _ in rows)
        for split in manifest.splits:
            totals[split] += statistics[split]
    if len(hashes) == manifest.num_rows:
        if fingerprint_hashes(hashes) != manifest.queries:
            problems.append(f"{folder}: its queries are not those that the manifest names")
        if len(ids) != len(hashes):
            problems.append(f"{folder}: a query stands in it twice")
        problems.extend(_check_totals(folder, manifest, totals))
    return VerifyReport(manifest=manifest, problems=tuple(problems), rows=len(hashes))


def _check_shard(
    folder: Path, entry: ShardEntry, manifest: Manifest
) -> tuple[dict[str, SplitStatistics], list[Identity]]:
    """Return the sums and the identity of a shard's rows, or raise what is wrong with it."""
    path = folder / entry.path
    check_bytes(path, entry)
    ensure_sound(folder, manifest, entry)
    file = open_shard(folder, entry, manifest)
    rows: list[Identity] = []
    sums = {split: SplitStatistics() for split in SPLITS}
    for group in file.row_groups():
        for problem in row_group_problems(group, manifest.recipe):
            raise CorruptCacheError(f"{path}: {problem}; build or get the shard again")
        rows.extend(group.identities())
        for split, found in group_statistics(group).items():
            sums[split] += found
    file.close()
    splits = [split for _, split, _ in rows]
    expected = [split for split, count in entry.rows.items() for _ in range(count)]
    if splits != expected:
        there = " and ".join(f"{splits.count(split)} {split}" for split in entry.rows)
        listed = " and then ".join(map(str, entry.rows.values()))
        raise CorruptCacheError(f"{path}: {there} rows in its order, the manifest says {listed}")
    for split in manifest.splits:
        if not sums[split].agrees_with(file.statistics[split]):
            raise CorruptCacheError(
                f"{path}: its sums over {split} rows ({file.statistics[split].summary()}) are not "
                f"those of its rows ({sums[split].summary()}); get the shard again"
            )
    return sums, rows


def _check_totals(
    folder: Path, manifest: Manifest, totals: dict[str, SplitStatistics]
) -> Iterator[str]:
    for split in manifest.splits:
        listed, found = manifest.splits[split], totals[split]
        if not listed.agrees_with(found):
            yield (
                f"{folder}: {split} has {found.summary()}, the manifest says {listed.summary()}; "
                "get the manifest again"
            )
