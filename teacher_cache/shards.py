"""One shard: written atomically, described by its own metadata, read a row group at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from duet_unlearn.data.errors import CacheError, CorruptCacheError
from duet_unlearn.teacher_cache.files import atomic_path
from duet_unlearn.teacher_cache.fingerprint import sha256_file
from duet_unlearn.teacher_cache.manifest import ShardEntry, shard_name
from duet_unlearn.teacher_cache.recipe import Recipe
from duet_unlearn.teacher_cache.schema import (
    FORMAT_VERSION,
    META_COUNT,
    META_ENGINE,
    META_INDEX,
    META_QUERIES,
    META_RECIPE,
    META_RECIPE_ID,
    META_STATISTICS,
    META_VERSION,
    SHARD_FOLDER,
    SPLITS,
    CacheRow,
    rows_per_group,
    rows_to_table,
    shard_schema,
)
from duet_unlearn.teacher_cache.statistics import SplitStatistics, rows_statistics

# Footers of honest shards are a few kilobytes; the limits keep a hostile one from claiming
# gigabytes before anything is checked.
_THRIFT_LIMIT = 64 << 20
_COMPRESSION_LEVEL = 3
_BYTE_STREAM_SPLIT = ("logits", "logsumexp", "token_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardHeader:
    """What a shard says about itself in its Parquet metadata."""

    recipe: Recipe
    queries: str
    """Fingerprint of the whole set of queries that the cache is built for."""
    index: int
    count: int
    """Position of the shard and number of shards."""
    engine: dict[str, Any]
    """The engine that computed the rows, with versions and settings."""


def shard_path(cache: Path, index: int, count: int) -> Path:
    """Return where shard `index` of `count` lies in a cache folder."""
    return cache / SHARD_FOLDER / shard_name(index, count)


def check_storable(row: CacheRow, recipe: Recipe) -> None:
    """Check that a row is what the format allows, before it is written.

    Raises:
        CacheError: The engine gave wrong shapes, ids out of range, values that are not finite, or
            logits too large for float16.
    """
    signal = row.signal
    where = f"query {row.query_id}"
    positions = len(signal.response_ids)
    expected = (positions, recipe.top_k)
    if not 1 <= positions <= recipe.positions or signal.logsumexp.shape != (positions,):
        raise CacheError(
            f"{where}: the engine gave {positions} positions, asked {recipe.positions}"
        )
    if signal.token_ids.shape != expected or signal.logits.shape != expected:
        raise CacheError(
            f"{where}: the engine gave token ids {signal.token_ids.shape} and logits "
            f"{signal.logits.shape}, expected {expected}"
        )
    if positions < recipe.positions and int(signal.response_ids[-1]) not in recipe.eos_token_ids:
        raise CacheError(
            f"{where}: the engine stopped after {positions} of {recipe.positions} positions "
            "without an end-of-sequence token"
        )
    if signal.token_ids.min() < 0 or signal.token_ids.max() >= recipe.vocab_size:
        raise CacheError(f"{where}: token ids outside the vocabulary of {recipe.vocab_size}")
    if not (np.isfinite(signal.logits).all() and np.isfinite(signal.logsumexp).all()):
        raise CacheError(
            f"{where}: the teacher gave logits that are not finite; try --teacher-dtype float32"
        )
    limit = float(np.finfo(np.float16).max)
    if recipe.logit_dtype == "float16" and float(np.abs(signal.logits).max()) > limit:
        raise CacheError(
            f"{where}: a logit of {float(np.abs(signal.logits).max()):.0f} does not fit float16; "
            "give --logit-dtype float32"
        )


def write_shard(cache: Path, rows: Sequence[CacheRow], header: ShardHeader) -> ShardEntry:
    """Write one shard under its final name, whole or not at all.

    Args:
        cache: The cache folder.
        rows: The shard's rows, forget rows first.
        header: What goes into the metadata beside the sums of `rows`.

    Raises:
        CacheError: A row is not storable, or the folder cannot be written.
    """
    for row in rows:
        check_storable(row, header.recipe)
    statistics = rows_statistics(rows)
    table = rows_to_table(rows, header.recipe.logit_dtype)
    table = table.replace_schema_metadata(_metadata(header, statistics))
    path = shard_path(cache, header.index, header.count)
    group_rows = rows_per_group(header.recipe.top_k, header.recipe.positions)
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=group_rows,
            compression="zstd",
            compression_level=_COMPRESSION_LEVEL,
            use_dictionary=["split"],
            use_byte_stream_split=[f"{name}.list.element" for name in _BYTE_STREAM_SPLIT],
            write_page_checksum=True,
            write_statistics=["query_id", "split"],
        )
    return entry_of(path, {split: statistics[split].rows for split in SPLITS}, group_rows)


def entry_of(path: Path, rows: dict[str, int], row_group_rows: int) -> ShardEntry:
    """Describe a finished shard file for the manifest; hashes its bytes."""
    return ShardEntry(
        name=path.name,
        rows=rows,
        row_group_rows=row_group_rows,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )


def _metadata(header: ShardHeader, statistics: dict[str, SplitStatistics]) -> dict[bytes, bytes]:
    def pack(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()

    return {
        META_VERSION: str(FORMAT_VERSION).encode(),
        META_RECIPE_ID: header.recipe.recipe_id.encode(),
        META_RECIPE: pack(header.recipe.to_json()),
        META_QUERIES: header.queries.encode(),
        META_INDEX: str(header.index).encode(),
        META_COUNT: str(header.count).encode(),
        META_ENGINE: pack(header.engine),
        META_STATISTICS: pack({split: statistics[split].to_json() for split in SPLITS}),
    }


class ShardFile:
    """An open shard: its header, the sums over its rows a split, and its row groups.

    Raises:
        CorruptCacheError: The file is not a shard of format version 1.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(
                path,
                page_checksum_verification=True,
                thrift_string_size_limit=_THRIFT_LIMIT,
                thrift_container_size_limit=1 << 20,
                pre_buffer=False,
            )
            metadata = self._file.schema_arrow.metadata or {}
            schema = self._file.schema_arrow
        except FileNotFoundError:
            raise CorruptCacheError(f"{path}: the shard is missing; get the cache again") from None
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
        self.header, self.statistics = _read_metadata(path, metadata)
        expected = shard_schema(self.header.recipe.logit_dtype)
        # Other writers may name list items or dictionary indices differently; names and
        # value types are what the format fixes.
        if [_plain(f) for f in schema] != [_plain(f) for f in expected]:
            raise CorruptCacheError(
                f"{path}: columns {', '.join(schema.names)[:120]} or their types are not those of "
                f"format version {FORMAT_VERSION}; get the cache again"
            )

    @property
    def num_rows(self) -> int:
        """Rows in the file, as its footer says."""
        return int(self._file.metadata.num_rows)

    @property
    def row_group_sizes(self) -> list[int]:
        """Rows of each row group, as the footer says."""
        metadata = self._file.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read_row_group(self, index: int) -> "RowGroup":
        """Decode one row group.

        Raises:
            CorruptCacheError: Its bytes are damaged or its rows are not T*K long.
        """
        try:
            table = self._file.read_row_group(index, use_threads=False).combine_chunks()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _unreadable(self.path, error) from error
        return RowGroup(table, self.header.recipe, f"{self.path}: row group {index}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _unreadable(path: Path, error: Exception) -> CorruptCacheError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:160]
    return CorruptCacheError(f"{path}: damaged shard ({reason}); get the cache again")


def _plain(field: pa.Field) -> tuple[str, str]:
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return field.name, f"list<{kind.value_type}>"
    return field.name, "string" if pa.types.is_large_string(kind) else str(kind)


def _read_metadata(
    path: Path, metadata: dict[bytes, bytes]
) -> tuple[ShardHeader, dict[str, SplitStatistics]]:
    try:
        version = metadata[META_VERSION].decode()
        if version != str(FORMAT_VERSION):
            raise CorruptCacheError(
                f"{path}: format version {version[:20]}, expected {FORMAT_VERSION}"
            )
        recipe = Recipe.from_json(json.loads(metadata[META_RECIPE]))
        if metadata[META_RECIPE_ID].decode() != recipe.recipe_id:
            raise CorruptCacheError(f"{path}: recipe id is not that of its recipe")
        engine = json.loads(metadata[META_ENGINE])
        sums = json.loads(metadata[META_STATISTICS])
        if not isinstance(engine, dict) or not isinstance(sums, dict):
            raise CorruptCacheError(f"{path}: metadata of the wrong type")
        header = ShardHeader(
            recipe=recipe,
            queries=metadata[META_QUERIES].decode(),
            index=int(metadata[META_INDEX]),
            count=int(metadata[META_COUNT]),
            engine=engine,
        )
        return header, {split: SplitStatistics.from_json(sums.get(split)) for split in SPLITS}
    except CorruptCacheError as error:
        text = str(error)
        raise CorruptCacheError(text if str(path) in text else f"{path}: {text}") from None
    except KeyError as error:
        key = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
        raise CorruptCacheError(
            f"{path}: not a shard of a teacher cache, its metadata lacks {key}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{path}: metadata is not readable ({error})") from error


class RowGroup:
    """Decoded columns of consecutive rows; the arrays are views of Arrow's memory."""

    def __init__(self, table: pa.Table, recipe: Recipe, where: str) -> None:
        self._where = where
        self._top_k = recipe.top_k
        self.num_rows: int = table.num_rows
        for name in table.column_names:
            if table[name].null_count:
                raise CorruptCacheError(f"{where}: empty values in {name}; get the cache again")
        self._ids = table["query_id"]
        self._splits = table["split"]
        self._queries = table["query"]
        self.prompt_ids, self.prompt_offsets = _flatten(table["prompt_ids"])
        self.response_ids, self.response_offsets = _flatten(table["response_ids"])
        token_ids, token_offsets = _flatten(table["token_ids"])
        logits, logit_offsets = _flatten(table["logits"])
        self.logsumexp, lse_offsets = _flatten(table["logsumexp"])
        lengths = np.diff(self.response_offsets)
        scaled = self.response_offsets * recipe.top_k
        if (
            (lengths < 1).any()
            or (lengths > recipe.positions).any()
            or not np.array_equal(lse_offsets, self.response_offsets)
            or not np.array_equal(token_offsets, scaled)
            or not np.array_equal(logit_offsets, scaled)
        ):
            raise CorruptCacheError(
                f"{where}: rows are not T*K long (T up to {recipe.positions}, K {recipe.top_k}); "
                "get the cache again"
            )
        self.token_ids = token_ids.reshape(-1, recipe.top_k)
        self.logits = logits.reshape(-1, recipe.top_k)

    def query_id(self, row: int) -> str:
        """Return a row's query id."""
        return str(self._ids[row])

    def query(self, row: int) -> str:
        """Return a row's query text."""
        return str(self._queries[row])

    def split(self, row: int) -> str:
        """Return a row's split."""
        return str(self._splits[row])

    def query_ids(self) -> list[str]:
        """Return all query ids."""
        return list(self._ids.to_pylist())

    def queries(self) -> list[str]:
        """Return all query texts."""
        return list(self._queries.to_pylist())

    def splits(self) -> list[str]:
        """Return the split of all rows."""
        return list(self._splits.to_pylist())


def _flatten(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the values and the row offsets, starting at 0, of a list column."""
    if column.num_chunks == 0:
        return np.empty(0, column.type.value_type.to_pandas_dtype()), np.zeros(1, np.int64)
    array = column.chunk(0)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    return values.to_numpy(zero_copy_only=values.null_count == 0), offsets - offsets[0]
