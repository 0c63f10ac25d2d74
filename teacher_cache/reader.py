"""Stream a finished cache: any row by its index, a row group decoded at a time.

Memory is bounded by a few row groups whatever the size of the cache, so a sampler that stays near
recent rows reads every byte once. Values come back as numpy arrays.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import CorruptCacheError
from duet_unlearn.files import user_path
from duet_unlearn.teacher_cache.format.manifest import (
    Manifest,
    ShardEntry,
    check_pin,
    read_manifest,
    split_pin,
)
from duet_unlearn.teacher_cache.format.quarantine import ensure_sound
from duet_unlearn.teacher_cache.format.row_group import Identity, RowGroup
from duet_unlearn.teacher_cache.format.schema import SPLITS
from duet_unlearn.teacher_cache.format.shard import ShardFile
from duet_unlearn.urls import is_url

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.torch_rows import TorchRows

# Enough for a sampler that mixes rows of a window of groups.
RECENT_ROW_GROUPS = 16
_RECENT_FILES = 8
_DAMAGED = "get the cache again, or push a sound one again with --check"


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedRow:
    """One row of a cache, T positions of K tokens; the arrays are read-only views."""

    query_id: str
    split: str
    query: str
    prompt_ids: npt.NDArray[np.int32]
    """The student's prompt, `[P]`."""
    response_ids: npt.NDArray[np.int32]
    """The tokens along the positions, `[T]`: what the teacher decoded, or what was given."""
    token_ids: npt.NDArray[np.int32]
    """Top-K ids by descending logit, `[T, K]`; the first again in places without a token."""
    logits: npt.NDArray[np.float32]
    """Raw logits, `[T, K]`; minus infinity in places without a token."""
    logsumexp: npt.NDArray[np.float32]
    """Over the full vocabulary, in nats, `[T]`."""


@dataclass(eq=False, repr=False)
class Shards:
    """The shards of one cache in a local folder."""

    manifest: Manifest
    folder: Path
    """A folder in the layout of a cache, in which shards are or will be."""

    def path(self, index: int) -> Path:
        """Return where a shard lies, once it is there.

        Raises:
            CacheError: It cannot be had.
        """
        return self.folder / self.manifest.shards[index].path


class CacheReader:
    """Random access to the rows of a finished cache in bounded memory."""

    def __init__(self, shards: Shards) -> None:
        self.folder = shards.folder
        self.manifest = manifest = shards.manifest
        self._shards = shards
        self.num_rows = manifest.num_rows
        counts = [list(shard.rows.values()) for shard in manifest.shards]
        codes = np.arange(len(SPLITS), dtype=np.uint8)
        self.splits = np.concatenate([np.repeat(codes[: len(c)], c) for c in counts])
        """Split of every row, `[num_rows]`, its place in `SPLITS`."""
        # Of each row group, its shard and which of that shard's it is.
        self._locations: list[tuple[int, int]] = []
        groups: list[range] = []
        first = 0
        for index, shard in enumerate(manifest.shards):
            for group, size in enumerate(shard.row_group_sizes):
                self._locations.append((index, group))
                groups.append(range(first, first + size))
                first += size
        self.row_groups: tuple[range, ...] = tuple(groups)
        """Row indices that are decoded together, in file order."""
        self._starts = np.array([group.start for group in groups])
        self._recent: OrderedDict[int, RowGroup] = OrderedDict()
        self._files: OrderedDict[int, ShardFile] = OrderedDict()
        self._states: dict[int, tuple[int, ...]] = {}

    @classmethod
    def open(cls, cache: str | Path) -> "CacheReader":
        """Open `PATH`, `URL` or one of them with `@sha256:DIGEST`, and check the manifest.

        A cache that neither was built here nor opened before is checked row by row, once. The
        shards of a URL are fetched and checked when they are needed, and kept for the next time.

        Raises:
            CacheError: There is no finished cache there.
            CorruptCacheError: The manifest or a shard is damaged, or a shard is missing.
            MismatchError: The cache has another digest than the one given.
        """
        if isinstance(cache, str) and is_url(cache):
            from duet_unlearn.teacher_cache.share.remote import open_remote

            return cls(open_remote(cache))
        folder, manifest = read_pinned(cache)
        for shard in manifest.shards:
            path = folder / shard.path
            check_size(path, shard, str(path))
        ensure_sound(folder, manifest)
        return cls(Shards(manifest, folder))

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[CachedRow]:
        return map(self.row, range(self.num_rows))

    @overload
    def __getitem__(self, index: int) -> CachedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[CachedRow]: ...
    def __getitem__(self, index: int | slice) -> CachedRow | list[CachedRow]:
        """Return one row, counted from the end where the index is negative, or a list of rows."""
        found = range(self.num_rows)[index]
        return self.row(found) if isinstance(found, int) else [self.row(row) for row in found]

    def torch_dataset(self) -> "TorchRows":
        """Return the rows as a torch dataset, which loaders may read in several processes."""
        from duet_unlearn.teacher_cache.torch_rows import TorchRows

        return TorchRows(self._shards)

    def row(self, index: int) -> CachedRow:
        """Return one row by its index in file order.

        Raises:
            IndexError: The index is not in `range(num_rows)`.
            CorruptCacheError: The row's shard is damaged or does not belong to this cache.
        """
        group_index = self.group_of(index)
        group = self.group(group_index)
        row = index - self.row_groups[group_index].start
        prompt = slice(*group.prompt_offsets[row : row + 2])
        positions = slice(*group.response_offsets[row : row + 2])
        return CachedRow(
            query_id=group.query_id(row),
            split=SPLITS[self.splits[index]],
            query=group.query(row),
            prompt_ids=group.prompt_ids[prompt],
            response_ids=group.response_ids[positions],
            token_ids=group.token_ids[positions],
            logits=group.logits[positions].astype(np.float32, copy=False),
            logsumexp=group.logsumexp[positions],
        )

    def group_of(self, row: int) -> int:
        """Return the index of the row group that a row is in.

        Raises:
            IndexError: The row is not in `range(num_rows)`.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of a cache with {self.num_rows} rows")
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def engines_of(self, row: int) -> tuple[dict[str, Any], ...]:
        """Return the engines that computed the shard of a row.

        Raises:
            CorruptCacheError: The shard is damaged or does not belong to this cache.
        """
        return self._file(self._locations[self.group_of(row)][0]).header.engines

    def identities(self) -> Iterator[Identity]:
        """Yield `(query_id, split, query)` of every row in file order; decodes no signals.

        Raises:
            CorruptCacheError: A shard is damaged or does not belong to this cache.
        """
        for rows, (shard, group) in zip(self.row_groups, self._locations, strict=True):
            found = self._file(shard).read_identities(group)
            self._check_splits([SPLITS.index(split) for _, split, _ in found], rows, shard)
            yield from found

    def group(self, index: int) -> RowGroup:
        """Return a decoded row group, the columns of `row_groups[index]`.

        Raises:
            CorruptCacheError: Its shard is damaged or does not belong to this cache.
        """
        if index in self._recent:
            self._recent.move_to_end(index)
            return self._recent[index]
        shard, place = self._locations[index]
        group = self._file(shard).read_row_group(place)
        self._check_splits(group.split_codes, self.row_groups[index], shard)
        self._recent[index] = group
        if len(self._recent) > RECENT_ROW_GROUPS:
            self._recent.popitem(last=False)
        return group

    def close(self) -> None:
        """Close files, and drop what is decoded but the last row group; reading opens them again.

        Whoever reads many caches one after the other calls this between two.
        """
        for file in self._files.values():
            file.close()
        self._files.clear()
        while len(self._recent) > 1:
            self._recent.popitem(last=False)

    def _check_splits(self, codes: npt.ArrayLike, rows: range, shard: int) -> None:
        if not np.array_equal(codes, self.splits[rows.start : rows.stop]):
            path = self.folder / self.manifest.shards[shard].path
            raise CorruptCacheError(f"{path}: the splits of its rows are not the manifest's")

    def _file(self, shard: int) -> ShardFile:
        """Return an open shard whose bytes are those that the manifest names, now."""
        entry = self.manifest.shards[shard]
        path = self._shards.path(shard)
        # A pin holds for as long as the cache is read: a file that was touched is hashed again.
        state = file_state(path)
        if state != self._states.get(shard):
            if shard in self._files:
                self._files.pop(shard).close()
            check_bytes(path, entry)
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        file = open_shard(self.folder, entry, self.manifest)
        if file_state(path) != state:
            raise CorruptCacheError(f"{path}: changed while it was opened; run the same again")
        self._states[shard] = state
        self._files[shard] = file
        if len(self._files) > _RECENT_FILES:
            self._files.popitem(last=False)[1].close()
        return file


def read_pinned(cache: str | Path) -> tuple[Path, Manifest]:
    """Read and check the manifest of a local cache; return the cache's folder and the manifest.

    Args:
        cache: `PATH` or `PATH@sha256:DIGEST`.

    Raises:
        CacheError: There is no finished cache there, or its manifest is damaged.
        MismatchError: The cache has another digest than the one given.
    """
    place, pin = split_pin(cache)
    folder = user_path(place, "cache") if place else Path()
    manifest = read_manifest(folder)
    check_pin(manifest, pin, folder)
    return folder, manifest


def file_state(path: Path) -> tuple[int, ...]:
    """Return what changes whenever a file's content does or another file takes its name.

    Raises:
        CorruptCacheError: There is no such file.
    """
    try:
        found = path.stat()
    except OSError:
        raise CorruptCacheError(f"{path}: the shard is missing; {_DAMAGED}") from None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_shard(folder: Path, entry: ShardEntry, manifest: Manifest) -> ShardFile:
    """Open a shard and check that it is the one its manifest means.

    Raises:
        CorruptCacheError: It is missing, damaged, or a shard of another place or recipe.
    """
    path = folder / entry.path
    file = ShardFile(path)
    if file.header.recipe != manifest.recipe:
        differences = "; ".join(manifest.recipe.differences(file.header.recipe))
        raise CorruptCacheError(f"{path}: a shard of another recipe ({differences})")
    if file.header.queries != manifest.queries:
        raise CorruptCacheError(f"{path}: a shard of another cache of this recipe; get it again")
    if (file.header.index, file.header.count) != (entry.index, len(manifest.shards)):
        raise CorruptCacheError(
            f"{path}: is shard {file.header.index} of {file.header.count}, expected "
            f"{entry.index} of {len(manifest.shards)}; shards were swapped"
        )
    if file.row_group_sizes != entry.row_group_sizes:
        raise CorruptCacheError(
            f"{path}: {file.num_rows} rows in {len(file.row_group_sizes)} row groups, the manifest "
            f"says {entry.num_rows} in groups of {entry.row_group_rows}; get it again"
        )
    return file


def check_size(path: Path, shard: ShardEntry, where: str) -> None:
    """Check that a shard is there with the size its manifest gives.

    Raises:
        CorruptCacheError: It is missing or has another size.
    """
    if not path.is_file():  # a pipe or a device would hang or never end
        raise CorruptCacheError(f"{where}: the shard is missing; {_DAMAGED}")
    if (found := path.stat().st_size) != shard.bytes:
        raise CorruptCacheError(
            f"{where}: {found} bytes, the manifest says {shard.bytes}; {_DAMAGED}"
        )


def check_bytes(path: Path, shard: ShardEntry, where: str | None = None) -> None:
    """Check that a file's bytes are those that a manifest names; `where` names it in the message.

    Raises:
        CorruptCacheError: They are not, or the file cannot be read.
    """
    where = where or str(path)
    check_size(path, shard, where)
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise CorruptCacheError(f"{where}: cannot be read ({error.strerror})") from error
    if digest != shard.sha256:
        raise CorruptCacheError(
            f"{where}: its bytes have {digest[:19]}, the manifest says {shard.sha256[:19]}; "
            f"{_DAMAGED}"
        )
