"""Check every byte and every row of a finished cache, and name the shard that is bad."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from duet_unlearn.data.errors import CorruptCacheError, MismatchError
from duet_unlearn.data.queries import fingerprint_rows
from duet_unlearn.teacher_cache.fingerprint import sha256_file
from duet_unlearn.teacher_cache.manifest import Manifest, ShardEntry, read_manifest, split_pin
from duet_unlearn.teacher_cache.reader import check_size, open_shard
from duet_unlearn.teacher_cache.recipe import Recipe
from duet_unlearn.teacher_cache.schema import SHARD_FOLDER, SPLITS
from duet_unlearn.teacher_cache.shards import RowGroup
from duet_unlearn.teacher_cache.statistics import SplitStatistics

logger = logging.getLogger(__name__)

# Rounding a logit to float16 moves it by at most half a unit in the last place, 2**-11 of it.
_HALF_ULP = {"float16": 2.0**-11, "float32": 2.0**-24}


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

    Goes on after a bad shard, so that all of them are named.

    Raises:
        CacheError: There is no finished cache, or its manifest is damaged.
        MismatchError: The cache has another digest than the one given.
    """
    folder, pin = split_pin(cache)
    manifest = read_manifest(folder)
    if pin not in (None, manifest.digest):
        raise MismatchError(f"{folder}: this cache has digest {manifest.digest}, expected {pin}")
    problems = _extra_files(folder, manifest)
    totals = {split: SplitStatistics() for split in SPLITS}
    identities: list[tuple[str, str, str]] = []
    checked = 0
    for entry in tqdm(manifest.shards, desc="verify", unit=" shards", disable=None):
        try:
            statistics, rows = _check_shard(folder, entry, manifest)
        except CorruptCacheError as error:
            problems.append(str(error))
            continue
        identities.extend(rows)
        checked += len(rows)
        for split in SPLITS:
            totals[split] += statistics[split]
    if checked == manifest.num_rows:
        problems.extend(_check_whole(folder, manifest, totals, identities))
    return VerifyReport(manifest=manifest, problems=tuple(problems), rows=checked)


def _extra_files(folder: Path, manifest: Manifest) -> list[str]:
    listed = {shard.name for shard in manifest.shards}
    shards = folder / SHARD_FOLDER
    found = {path.name for path in shards.iterdir()} if shards.is_dir() else set()
    return [
        f"{shards / name}: not listed in the manifest; remove it" for name in sorted(found - listed)
    ]


def _check_shard(
    folder: Path, entry: ShardEntry, manifest: Manifest
) -> tuple[dict[str, SplitStatistics], list[tuple[str, str, str]]]:
    """Return a shard's own sums and the identity of its rows, or raise what is wrong with it."""
    path = folder / SHARD_FOLDER / entry.name
    check_size(folder, entry)
    digest = sha256_file(path)
    if digest != entry.sha256:
        raise CorruptCacheError(
            f"{path}: its bytes have {digest[:19]}, the manifest says {entry.sha256[:19]}; "
            "get the shard again"
        )
    file = open_shard(folder, entry, manifest)
    rows: list[tuple[str, str, str]] = []
    for index in range(len(file.row_group_sizes)):
        group = file.read_row_group(index)
        for problem in row_group_problems(group, manifest.recipe):
            raise CorruptCacheError(f"{path}: row group {index}: {problem}; get the shard again")
        rows.extend(zip(group.query_ids(), group.splits(), group.queries(), strict=True))
    file.close()
    splits = [split for _, split, _ in rows]
    expected = [split for split in SPLITS for _ in range(entry.rows[split])]
    if splits != expected:
        raise CorruptCacheError(
            f"{path}: {splits.count('forget')} forget and {splits.count('retain')} retain rows in "
            f"its order, the manifest says {entry.rows['forget']} and then {entry.rows['retain']}"
        )
    return file.statistics, rows


def row_group_problems(group: RowGroup, recipe: Recipe) -> Iterator[str]:
    """Yield what breaks the format's rules in a row group, a short phrase each."""
    width = recipe.vocab_size
    for name in ("prompt_ids", "response_ids", "token_ids"):
        ids: npt.NDArray[np.int32] = getattr(group, name)
        if ids.size and not (ids.min() >= 0 and ids.max() < width):
            yield f"{name} outside the vocabulary of {width}"
    logits = group.logits.astype(np.float32)
    if not (np.isfinite(logits).all() and np.isfinite(group.logsumexp).all()):
        yield "logits or logsumexp that are not finite"
        return
    if (np.diff(logits, axis=1) > 0).any():
        yield "logits that do not fall"
    ordered = np.sort(group.token_ids, axis=1)
    if (np.diff(ordered, axis=1) == 0).any():
        yield "a token id twice at one position"
    slack = np.abs(logits).max(axis=1) * _HALF_ULP[recipe.logit_dtype] + 1e-4
    if (group.logsumexp < logits[:, 0] - slack).any():
        yield "a logsumexp below the largest logit"
    if (np.diff(group.prompt_offsets) < 1).any():
        yield "an empty prompt"
    lengths = np.diff(group.response_offsets)
    last = group.response_ids[group.response_offsets[1:] - 1]
    if (~np.isin(last[lengths < recipe.positions], recipe.eos_token_ids)).any():
        yield "a response that ends early without an end-of-sequence token"


def _check_whole(
    folder: Path,
    manifest: Manifest,
    totals: dict[str, SplitStatistics],
    identities: list[tuple[str, str, str]],
) -> Iterator[str]:
    if fingerprint_rows(identities) != manifest.queries:
        yield f"{folder}: its queries are not those that the manifest names"
    if len({(split, query_id) for query_id, split, _ in identities}) != len(identities):
        yield f"{folder}: a query stands in it twice"
    for split in SPLITS:
        listed, found = manifest.splits[split], totals[split]
        if (listed.rows, listed.positions) != (found.rows, found.positions):
            yield (
                f"{folder}: {found.rows} {split} rows with {found.positions} positions, the "
                f"manifest says {listed.rows} with {listed.positions}"
            )
