"""Join the parts of a build: check that every shard is there, and write the manifest.

The shards say all that decides a cache: recipe, number of shards, and a fingerprint of the set of
queries that the rows must have together. So a folder can be finished without the query files, and
one that lacks a row, or holds a row twice, cannot.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from duet_unlearn.errors import CacheError, CorruptCacheError, DuetError, MismatchError
from duet_unlearn.data.models.folder import model_name, resolve_model_folder
from duet_unlearn.data.prompts import load_tokenizer
from duet_unlearn.data.queries import fingerprint_rows
from duet_unlearn.teacher_cache.build.assemble import finish_cache
from duet_unlearn.files import remove_temporary_files
from duet_unlearn.data.models.fingerprint import tokenizer_fingerprint
from duet_unlearn.teacher_cache.build.lock import build_lock
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry, shard_name
from duet_unlearn.teacher_cache.build.part_notes import PartNotes, read_notes
from duet_unlearn.teacher_cache.build.parts import Part
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.format.row_group import Identity
from duet_unlearn.teacher_cache.format.samples import collect_samples
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER, SPLITS
from duet_unlearn.teacher_cache.format.shard import ShardFile, ShardHeader, entry_of

logger = logging.getLogger(__name__)

_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishResult:
    """What finishing a cache did."""

    manifest: Manifest
    hit: bool
    """It was finished already."""


def finish(
    cache: Path, teacher: str | None = None, *, trust_remote_code: bool = False
) -> FinishResult:
    """Write the manifest of a cache whose shards were built in parts.

    Args:
        cache: The folder that all parts were built in.
        teacher: Model folder or hub id, of which the tokenizer is read; by default the one that
            the parts used.
        trust_remote_code: Run code that comes with the tokenizer.

    Raises:
        CacheError: A shard is missing or damaged, and how to make it; or a part is still running.
        MismatchError: The shards belong to different builds, or the tokenizer is another one.
    """
    if not (cache / MANIFEST_NAME).exists():
        if not (cache / SHARD_FOLDER).is_dir():
            raise CacheError(
                f"{cache}: no {SHARD_FOLDER} folder; expected the --out of a duet-cache build"
            )
        with build_lock(cache):
            if not (cache / MANIFEST_NAME).exists():
                return FinishResult(manifest=_finish(cache, teacher, trust_remote_code), hit=False)
    return FinishResult(manifest=CacheReader.open(cache).manifest, hit=True)


def _finish(cache: Path, teacher: str | None, trust_remote_code: bool) -> Manifest:
    notes = read_notes(cache)
    header, sound = _common_header(cache)
    if len(sound) < header.count:
        missing = [index for index in range(header.count) if index not in sound]
        raise _incomplete(cache, missing, header.count, notes)
    entries: list[ShardEntry] = []
    if fingerprint_rows(_rows(cache, header.count, entries, notes)) != header.queries:
        raise MismatchError(
            f"{cache}: the shards do not hold the set of queries they were built for; delete the "
            "folder and build again"
        )
    model = teacher or (notes.teacher if notes else None)
    if model is None:
        raise CacheError(
            f"{cache}: no notes of a build in parts say which tokenizer belongs to it; give "
            "--teacher MODEL, or run its duet-cache build again"
        )
    folder = _tokenizer_folder(cache, model, header)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    samples = collect_samples(cache, entries, tokenizer)
    name = notes.name if notes and teacher is None else model_name(model)
    remove_temporary_files(cache)
    remove_temporary_files(cache / SHARD_FOLDER)
    return finish_cache(cache, header.recipe, header.queries, tuple(entries), name, samples)


def _path(cache: Path, index: int, count: int) -> Path:
    return cache / SHARD_FOLDER / shard_name(index, count)


def _common_header(cache: Path) -> tuple[ShardHeader, set[int]]:
    """Return what all shards say alike, and the indices of those that can be opened.

    Raises:
        CacheError: There are no shards.
        MismatchError: Two of them belong to different builds, or one has another's name.
    """
    first: ShardHeader | None = None
    sound = set()
    for path in sorted((cache / SHARD_FOLDER).glob("*.parquet")):
        try:
            file = ShardFile(path)
        except CorruptCacheError as error:
            logger.warning("%s", error)
            continue
        file.close()
        header = file.header
        first = first or header
        differences = header.recipe.differences(first.recipe)
        if header.queries != first.queries:
            differences.append(f"queries: {header.queries[:19]} / {first.queries[:19]}")
        if header.count != first.count:
            differences.append(f"number of shards: {header.count} / {first.count}")
        if path != _path(cache, header.index, header.count):
            differences.append(f"shard: {header.index} of {header.count} / {path.stem}")
        if differences:
            raise MismatchError(
                f"{path}: not of the same build as the other shards; differs (there / expected) in "
                f"{'; '.join(differences)}; remove what does not belong here"
            )
        sound.add(header.index)
    if first is None:
        raise CacheError(f"{cache}: no shards yet; build its parts with duet-cache build --shards")
    return first, sound


def _rows(
    cache: Path, count: int, entries: list[ShardEntry], notes: PartNotes | None
) -> Iterator[Identity]:
    """Yield the identities of all rows and fill in the manifest's entries; checks every row."""
    for index in range(count):
        file = ShardFile(_path(cache, index, count))
        rows = dict.fromkeys(SPLITS, 0)
        try:
            for group in map(file.read_row_group, range(len(file.row_group_sizes))):
                for identity in group.identities():
                    rows[identity[1]] += 1
                    yield identity
        except CorruptCacheError as error:
            logger.warning("%s", error)
            raise _incomplete(cache, [index], count, notes) from error
        finally:
            file.close()
        entries.append(entry_of(file.path, rows, max(file.row_group_sizes)))


def _incomplete(
    cache: Path, indices: Sequence[int], count: int, notes: PartNotes | None
) -> CacheError:
    """Return the error that names what is not there, and the command that makes it."""
    names = ", ".join(shard_name(index, count) for index in indices[:_MOST_NAMED])
    if len(indices) > _MOST_NAMED:
        names += ", ..."
    advice = "run its duet-cache build again, without --shards or with those of the missing parts"
    if notes:
        parts = sorted({Part.of_shard(index, notes.parts) for index in indices})
        each = ", ".join(map(str, parts[:_MOST_NAMED])) + ", ..." * (len(parts) > _MOST_NAMED)
        advice = f"part {each} did not finish, run: {notes.command} --shards {parts[0]}"
    return CacheError(
        f"{cache}: {len(indices)} of {count} shards missing or damaged ({names}); {advice}"
    )


def _tokenizer_folder(cache: Path, model: str, header: ShardHeader) -> Path:
    """Return the model folder, of which only the tokenizer is needed here.

    Raises:
        CacheError: There is no such model on this machine.
        MismatchError: Its tokenizer is not the one that the shards were built with.
    """
    try:
        folder = resolve_model_folder(model, need_weights=False)
    except DuetError as error:
        raise CacheError(f"{cache}: needs the teacher's tokenizer ({error}); give --teacher") from (
            error
        )
    found = tokenizer_fingerprint(folder)
    if found != header.recipe.tokenizer:
        raise MismatchError(
            f"{cache}: built with tokenizer {header.recipe.tokenizer[:19]}, but that of {model} is "
            f"{found[:19]}; give --teacher with the model that the parts used"
        )
    return folder
