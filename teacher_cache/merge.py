"""Join caches of one recipe into one: each query once, no teacher needed.

A query is known by split and text; where several caches hold it, the first one's signal is kept.
Memory holds a few hundred bytes a row, never the signals. Like a build, a stopped merge resumes.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from duet_unlearn.data.queries import fingerprint_hashes, hash_row, hashed_id
from duet_unlearn.errors import ConfigurationError, MismatchError
from duet_unlearn.files import claimed_folder, make_folder
from duet_unlearn.teacher_cache.build.assemble import Assembly, PlannedCache, Samples, find_finished
from duet_unlearn.teacher_cache.build.lock import build_lock
from duet_unlearn.teacher_cache.build.plan import check_shard_rows, plan_shards
from duet_unlearn.teacher_cache.build.row_source import Place, PlannedRows, RowSource, open_caches
from duet_unlearn.teacher_cache.format.manifest import Manifest, is_cache_folder
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.row_group import Identity, text_key
from duet_unlearn.teacher_cache.format.samples import QUERIES_PER_SPLIT
from duet_unlearn.teacher_cache.format.schema import SHARD_FOLDER, SPLITS
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.reader import CacheReader

logger = logging.getLogger(__name__)

_COMPARE_BYTES = 32 << 20
# How far apart two runs of one teacher may end up, relative to the largest logit: by the dtype it
# computes in (other kernels and batches), and by the dtype that logits are stored in.
_ROUNDING = {"float32": 2.0**-13, "bfloat16": 2.0**-6, "float16": 2.0**-8}
_STORING = {"float32": 0.0, "float16": 2.0**-10}
_LARGE_LOGIT = 32.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """What a merge did."""

    manifest: Manifest
    hit: bool
    """The finished cache was already there; nothing was written."""
    repeated_rows: int
    """Rows left out because an earlier cache, or an earlier row, has the query."""
    differing_rows: int
    """Those of them whose signal differs from the one kept by more than rounding."""
    renamed_rows: int
    """Rows whose id stood for another query already; they got an id that follows from the text."""


@dataclass(frozen=True, slots=True)
class _MergedRow:
    query_id: str
    split: str
    place: Place


class _Selection:
    """The rows that a merge keeps."""

    def __init__(self) -> None:
        self.rows: list[_MergedRow] = []
        self.repeats: list[tuple[Place, Place]] = []
        """The kept row and the one left out, for every repeated query."""
        self.renamed = 0
        self._queries: dict[bytes, Place] = {}
        self._ids: set[bytes] = set()

    def add_all(self, source: RowSource) -> Iterator[Identity]:
        """Select among all rows of a source; yield the identity of each that is kept."""
        for place, (query_id, split, text) in source.scan():
            first = self._queries.setdefault(text_key(split, text), place)
            if first != place:
                self.repeats.append((first, place))
                continue
            if text_key(split, query_id) in self._ids:
                query_id = hashed_id(split, text)
                self.renamed += 1
                if text_key(split, query_id) in self._ids:
                    raise MismatchError(
                        f"{split} query {query_id}: this id follows from its text, but another "
                        "query has it; build again with other ids and --reuse these caches"
                    )
            self._ids.add(text_key(split, query_id))
            self.rows.append(_MergedRow(query_id, split, place))
            yield query_id, split, text
        # While rows are written only their places are needed.
        self._queries.clear()
        self._ids.clear()


def merge(caches: Sequence[str], out: Path, *, shard_rows: int = 1024) -> MergeResult:
    """Join caches of one recipe, each with or without a pin; the first that has a query wins.

    Raises:
        ConfigurationError: `shard_rows` is out of range, or there is no cache.
        CacheError: One is no finished cache, or the folder cannot be written.
        MismatchError: They have different recipes, a part is missing, or the folder holds
            something else; the message lists what differs.
        StoppedError: The user interrupted the merge.
    """
    if not caches:
        raise ConfigurationError("no caches; give at least one cache to merge")
    readers = open_caches(caches)
    recipe = readers[0].manifest.recipe
    check_shard_rows(shard_rows, recipe.top_k, recipe.positions)
    source, selection = RowSource(readers), _Selection()
    whole = _check_parts(caches, readers)
    queries = fingerprint_hashes(map(hash_row, selection.add_all(source)))
    if whole not in (None, queries):
        raise MismatchError(
            f"{caches[0]} and its fellows: their rows together are not the set of queries that the "
            "parts were cut from; build the parts again"
        )
    shards = plan_shards(selection.rows, shard_rows)
    plan = PlannedCache(
        folder=out, recipe=recipe, queries=queries, shards=tuple(map(tuple, shards))
    )
    manifest = find_finished(plan)
    hit = manifest is not None
    if manifest is None:
        with claimed_folder(out, is_cache_folder), build_lock(out):
            make_folder(out / SHARD_FOLDER)
            differ = selection.renamed > 0
            manifest = _write(plan, shards, source, readers, ids_differ=differ)
    differing = _count_differing(source, selection.repeats, recipe)
    _report(selection, differing)
    return MergeResult(
        manifest=manifest,
        hit=hit,
        repeated_rows=len(selection.repeats),
        differing_rows=differing,
        renamed_rows=selection.renamed,
    )


def _check_parts(names: Sequence[str], readers: Sequence[CacheReader]) -> str | None:
    """Return the fingerprint of the set whose parts are given, None where they are whole caches.

    Raises:
        MismatchError: A part is missing, given twice, or of another set.
    """
    parts = [(name, reader.manifest.part) for name, reader in zip(names, readers, strict=True)]
    given = [(name, part) for name, part in parts if part is not None]
    if not given:
        return None
    first = given[0][1]
    seen: dict[int, str] = {}
    for name, part in parts:
        if part is None or (part.count, part.queries) != (first.count, first.queries):
            raise MismatchError(
                f"{name}: not a part of the set that {given[0][0]} is part "
                f"{first.number}/{first.count} of; join the parts first, the rest afterwards"
            )
        if part.number in seen:
            raise MismatchError(
                f"{name}: part {part.number}/{part.count}, as {seen[part.number]} is; give it once"
            )
        seen[part.number] = name
    if missing := [number for number in range(1, first.count + 1) if number not in seen]:
        shown = ", ".join(f"{number}/{first.count}" for number in missing[:5])
        raise MismatchError(
            f"{len(missing)} of {first.count} parts missing ({shown}); build them with "
            f"--shards {missing[0]}/{first.count} and name all parts"
        )
    return first.queries


def _write(
    plan: PlannedCache,
    shards: Sequence[Sequence[_MergedRow]],
    source: RowSource,
    readers: Sequence[CacheReader],
    *,
    ids_differ: bool,
) -> Manifest:
    assembly = Assembly(plan)
    places = {
        index: {number: row.place for number, row in enumerate(shards[index])}
        for index in assembly.missing
    }
    planned = PlannedRows(source, places, plan.recipe)
    try:
        for index in tqdm(assembly.missing, desc="merge", unit=" shards", disable=None):
            found = planned.take(index)
            rows = [
                replace(found[number], query_id=row.query_id)
                for number, row in enumerate(shards[index])
            ]
            assembly.write(index, rows, tuple(planned.engines(index)))
    except KeyboardInterrupt:
        raise assembly.stopped() from None
    kept = ((row.split, row.query_id, row.place[0]) for part in shards for row in part)
    samples = _samples(readers, kept, ids_differ=ids_differ)
    return assembly.finish(readers[0].manifest.teacher, samples)


def _samples(
    readers: Sequence[CacheReader], kept: Iterable[tuple[str, str, int]], *, ids_differ: bool
) -> Samples:
    """Return samples of the sources that are samples of the merged cache too.

    Their tokens are decoded already, so that merging needs no tokenizer. Where an id stands for
    different queries (`ids_differ`), a sample has to come from the cache that its row comes from.
    """
    kept = ((split, query_id, ids_differ * index) for split, query_id, index in kept)
    samples = {
        (sample["split"], sample["query_id"], ids_differ * index): sample
        for index, reader in reversed(list(enumerate(readers)))
        for sample in reader.manifest.samples
    }
    there = [key for key in kept if key in samples]
    return tuple(
        samples[key]
        for split in SPLITS
        for key in sorted(key for key in there if key[0] == split)[:QUERIES_PER_SPLIT]
    )


def _count_differing(
    source: RowSource, repeats: Sequence[tuple[Place, Place]], recipe: Recipe
) -> int:
    """Count the pairs of rows whose signals differ by more than rounding."""
    at_once = max(1, _COMPARE_BYTES // (16 * recipe.top_k * recipe.positions))
    relative = _ROUNDING[recipe.compute_dtype] + _STORING[recipe.logit_dtype]
    agree = draws_agree if recipe.keep == "sampled" else signals_agree
    differing = 0
    for start in range(0, len(repeats), at_once):
        pairs = repeats[start : start + at_once]
        rows = source.fetch(place for pair in pairs for place in pair)
        differing += sum(
            not agree(rows[first].signal, rows[other].signal, relative) for first, other in pairs
        )
    return differing


def signals_agree(first: Signal, other: Signal, relative: float) -> bool:
    """Say whether two signals of one query agree, up to `relative` of the largest logit."""
    if first.response_ids.tolist() != other.response_ids.tolist():
        return False
    largest = np.abs(first.logits, where=first.logits > -np.inf, out=np.zeros_like(first.logits))
    slack = relative * max(1.0, float(largest.max()))
    if np.abs(first.logsumexp - other.logsumexp).max() > slack:
        return False
    # Where rounding moves the mass of a token, one side may keep more of them than the other.
    counts = ((first.logits > -np.inf) & (other.logits > -np.inf)).sum(axis=1)
    for position, count in enumerate(counts):
        ours, theirs = (
            dict(zip(s.token_ids[position, :count].tolist(), s.logits[position], strict=False))
            for s in (first, other)
        )
        # A token that is only on one side may have been just below the other side's last.
        last_ours, last_theirs = (s.logits[position, count - 1] for s in (first, other))
        if any(
            abs(ours.get(token, last_ours) - theirs.get(token, last_theirs)) > slack
            for token in ours.keys() | theirs.keys()
        ):
            return False
    return True


def draws_agree(first: Signal, other: Signal, relative: float) -> bool:
    """Say whether two sides drew the same of one query, as far as rounding lets them.

    A logit that moves tips draws that fall near the border of two tokens, in the tail all of them:
    compared are responses, and shares up to one draw beside what a logit's rounding moves.
    """
    if first.response_ids.tolist() != other.response_ids.tolist():
        return False
    slack = 1.01 / first.token_ids.shape[1] + relative * _LARGE_LOGIT
    for position in range(len(first.response_ids)):
        ours, theirs = (
            dict(zip(s.token_ids[position].tolist()[::-1], s.logits[position][::-1], strict=True))
            for s in (first, other)
        )
        shares = (
            [
                np.exp(side.get(token, -np.inf) - first.logsumexp[position])
                for side in (ours, theirs)
            ]
            for token in ours.keys() | theirs.keys()
        )
        if any(abs(mine - theirs) > slack for mine, theirs in shares):
            return False
    return True


def _report(selection: _Selection, differing: int) -> None:
    if selection.repeats:
        logger.info("%d rows left out: their queries are there already", len(selection.repeats))
    if differing:
        logger.warning(
            "%d of %d repeated queries have signals that differ by more than rounding; those of "
            "the cache named first are kept",
            differing,
            len(selection.repeats),
        )
    if selection.renamed:
        logger.warning(
            "%d queries have an id that stands for another query in an earlier cache; they got "
            "ids that follow from their texts",
            selection.renamed,
        )
