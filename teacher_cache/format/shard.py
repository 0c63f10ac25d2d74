"""One shard: written atomically, described by its own metadata, read a row group at a time."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import CacheError, CorruptCacheError, first_line
from duet_unlearn.files import atomic_path
from duet_unlearn.teacher_cache.format.manifest import ShardEntry, shard_name
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.row_group import Identities, Identity, RowGroup, check_claims
from duet_unlearn.teacher_cache.format.schema import (
    COUNTS,
    FORMAT_VERSIONS,
    IDENTITY_COLUMNS,
    MAX_PROMPT_TOKENS,
    MAX_QUERY_BYTES,
    MAX_QUERY_ID_BYTES,
    MAX_SHARD_ROW_GROUPS,
    SHARD_FOLDER,
    CacheRow,
    row_group_rows,
    rows_to_table,
)
from duet_unlearn.teacher_cache.format.statistics import SplitStatistics, SplitSums, rows_statistics
from duet_unlearn.teacher_cache.format.strict_json import checked, parse_json

# Keys of a shard's Parquet metadata; values are UTF-8 text.
_META_VERSION = b"duet.format_version"
_META_RECIPE = b"duet.recipe"
_META_RECIPE_ID = b"duet.recipe_id"
_META_QUERIES = b"duet.queries"
_META_INDEX = b"duet.shard_index"
_META_COUNT = b"duet.shard_count"
_META_ENGINES = b"duet.engines"
_META_STATISTICS = b"duet.statistics"
_SUMS = pydantic.TypeAdapter(SplitSums)
# Limits of a shard's footer, which is read before anything else is known of it.
MAX_FOOTER_BYTES = 1 << 22
_COMPRESSION_LEVEL = 6
# A column of a row group in one page: smaller than several, and faster to read.
_PAGE_BYTES = 1 << 24
# What the Parquet library raises over a file that is no shard.
_LIBRARY_ERRORS = (OSError, ValueError, KeyError, pa.ArrowException)
_DICTIONARY_BYTES = 1 << 22
# The smallest that pyarrow, DuckDB, polars and pandas all read: DuckDB splits no float16, and older
# ones no integers. Ids repeat from row to row, so a dictionary beats splitting them.
_DICTIONARIES = ["split", "token_ids.list.element", f"{COUNTS}.list.element"]
_BYTE_STREAM_SPLIT = {"float16": ["logsumexp"], "float32": ["logsumexp", "logits"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardHeader:
    """What a shard says about itself in its Parquet metadata."""

    recipe: Recipe
    queries: str
    """Fingerprint of the whole set of queries that the cache is built for."""
    index: int
    count: int
    """Position of the shard and number of shards."""
    engines: tuple[dict[str, Any], ...]
    """The engines that computed the rows, with versions and settings; several where rows were
    taken over from other caches."""


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
    where = f"query {row.query_id[:80]}"
    for what, size, limit in (
        ("an id of {} bytes", len(row.query_id.encode()), MAX_QUERY_ID_BYTES),
        ("a text of {} bytes", len(row.query.encode()), MAX_QUERY_BYTES),
        ("a prompt of {} tokens", len(row.prompt_ids), MAX_PROMPT_TOKENS),
    ):
        if size > limit:
            raise CacheError(
                f"{where}: {what.format(size)}, the format takes {limit}; shorten or remove it"
            )
    positions = len(signal.response_ids)
    expected = (positions, recipe.top_k)
    if not 1 <= positions <= recipe.positions or signal.logsumexp.shape != (positions,):
        raise CacheError(f"{where}: the engine gave {positions} of {recipe.positions} positions")
    if signal.token_ids.shape != expected or signal.logits.shape != expected:
        raise CacheError(
            f"{where}: the engine gave token ids {signal.token_ids.shape} and logits "
            f"{signal.logits.shape}, expected {expected}"
        )
    ended = row.split == "train" or int(signal.response_ids[-1]) in recipe.eos_token_ids
    if positions < recipe.positions and not ended:
        raise CacheError(
            f"{where}: the engine stopped after {positions} of {recipe.positions} positions "
            "without an end-of-sequence token"
        )
    if signal.token_ids.min() < 0 or signal.token_ids.max() >= recipe.vocab_size:
        raise CacheError(f"{where}: token ids outside the vocabulary of {recipe.vocab_size}")
    # Empty places stand behind the tokens.
    fewest = 1 if COUNTS in recipe.columns else recipe.top_k
    counts = (signal.logits != -np.inf).sum(axis=1)
    logits = signal.logits[np.arange(recipe.top_k) < counts[:, None]]
    if counts.min() < fewest or not np.isfinite(np.append(logits, signal.logsumexp)).all():
        raise CacheError(
            f"{where}: the teacher gave logits that are not finite; try --teacher-dtype float32"
        )
    largest = float(np.abs(logits).max())
    if recipe.logit_dtype == "float16" and largest > float(np.finfo(np.float16).max):
        raise CacheError(
            f"{where}: a logit of {largest:.0f} does not fit float16; give --logit-dtype float32"
        )
    if (signal.logsumexp > signal.logits[:, 0] + math.log(recipe.vocab_size) + 1e-3).any():
        raise CacheError(f"{where}: its tokens were moved below all others; lower --strength")


def write_shard(cache: Path, rows: Sequence[CacheRow], header: ShardHeader) -> ShardEntry:
    """Write one shard under its final name, whole or not at all.

    Args:
        cache: The cache folder.
        rows: The shard's rows, in the order of `SPLITS`.
        header: What goes into the metadata beside the sums of `rows`.

    Raises:
        CacheError: A row is not storable, the shard is too long, or the folder cannot be written.
    """
    for row in rows:
        check_storable(row, header.recipe)
    statistics = rows_statistics(rows, header.recipe.logit_dtype)
    table = rows_to_table(rows, header.recipe.logit_dtype, header.recipe.columns)
    table = table.replace_schema_metadata(_metadata(header, statistics))
    path = shard_path(cache, header.index, header.count)
    is_sampled = header.recipe.keep == "sampled"  # then few numbers occur as logits
    # What the file itself shows, so that who reads it back later finds the same number.
    group_rows = min(len(rows), row_group_rows(rows, header.recipe.top_k, header.recipe.positions))
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=group_rows,
            compression="zstd",
            compression_level=_COMPRESSION_LEVEL,
            data_page_size=_PAGE_BYTES,
            use_dictionary=[*_DICTIONARIES, *(["logits.list.element"] if is_sampled else [])],
            dictionary_pagesize_limit=_DICTIONARY_BYTES,
            use_byte_stream_split=[
                f"{name}.list.element"
                for name in _BYTE_STREAM_SPLIT[header.recipe.logit_dtype]
                if not (is_sampled and name == "logits")
            ],
            write_page_checksum=True,
            write_statistics=["query_id", "split"],
        )
        try:
            _check_footer(pq.read_metadata(temporary))
        except ValueError as error:
            raise CacheError(
                f"{path}: cannot be written ({error}); give a smaller --shard-rows"
            ) from None
    counts = {split: statistics[split].rows for split in header.recipe.splits}
    return entry_of(path, counts, group_rows)


def _check_footer(footer: pq.FileMetaData) -> None:
    """Refuse a footer that no reader would take with a ValueError."""
    if footer.serialized_size > MAX_FOOTER_BYTES:
        raise ValueError(
            f"a footer of {footer.serialized_size} bytes, expected at most {MAX_FOOTER_BYTES}"
        )
    if not 0 < footer.num_row_groups <= MAX_SHARD_ROW_GROUPS:
        raise ValueError(
            f"{footer.num_row_groups} row groups, expected 1 to {MAX_SHARD_ROW_GROUPS}"
        )


def _check_schema(schema: pq.ParquetSchema, names: Sequence[str]) -> None:
    """Check that the columns are those of the format, whichever way a writer describes them."""
    columns = [schema.column(index) for index in range(len(schema))]
    if [column.path.split(".")[0] for column in columns] != list(names):
        raise ValueError(f"a schema of other columns than {', '.join(names)}")
    for name, column in zip(names, columns, strict=True):
        kind, logical = column.physical_type, column.logical_type.type
        if name in IDENTITY_COLUMNS:
            fits = (kind, logical, column.max_repetition_level) == ("BYTE_ARRAY", "STRING", 0)
        elif name in ("logits", "logsumexp"):
            half = name == "logits" and (logical, column.length) == ("FLOAT16", 2)
            fits = column.max_repetition_level == 1 and (kind == "FLOAT" or half)
        else:
            fits = (kind, column.max_repetition_level) == ("INT32", 1)
        if not fits:
            raise ValueError(f"column {name!r} is of another type than the format's")


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
        _META_VERSION: str(header.recipe.version).encode(),
        _META_RECIPE_ID: header.recipe.recipe_id.encode(),
        _META_RECIPE: pack(header.recipe.to_json()),
        _META_QUERIES: header.queries.encode(),
        _META_INDEX: str(header.index).encode(),
        _META_COUNT: str(header.count).encode(),
        _META_ENGINES: pack(list(header.engines)),
        _META_STATISTICS: pack({s: asdict(statistics[s]) for s in header.recipe.splits}),
    }


class ShardFile:
    """An open shard: its header, the sums over its rows a split, and its row groups.

    A shard from elsewhere has to pass `quarantine` first: what is wrong with it may show only when
    it has taken all memory.

    Raises:
        CorruptCacheError: The file is not a shard of a known version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CorruptCacheError(f"{path}: the shard is missing; get the cache again")
        try:
            self._file = pq.ParquetFile(
                path,
                # Texts stay as they are packed: unpacking may multiply their size.
                read_dictionary=list(IDENTITY_COLUMNS),
                page_checksum_verification=True,
                pre_buffer=False,
            )
            self._footer = self._file.metadata
            _check_footer(self._footer)
            self.header, self.statistics = _read_metadata(path, self._footer.metadata or {})
            _check_schema(self._footer.schema, self.header.recipe.columns)
        except _LIBRARY_ERRORS as error:
            raise _unreadable(path, error) from error
        logits = self._footer.schema.column(self.header.recipe.columns.index("logits"))
        stored = "float32" if logits.physical_type == "FLOAT" else "float16"
        if stored != self.header.recipe.logit_dtype:
            raise CorruptCacheError(
                f"{path}: logits in {stored}, its recipe says "
                f"{self.header.recipe.logit_dtype}; get the cache again"
            )

    @property
    def num_rows(self) -> int:
        """Rows in the file, as its footer says."""
        return int(self._footer.num_rows)

    @property
    def row_group_sizes(self) -> list[int]:
        """Rows of each row group, as the footer says."""
        return [
            self._footer.row_group(index).num_rows for index in range(self._footer.num_row_groups)
        ]

    def check_claims(self) -> None:
        """Check that no row group is described as larger than the format allows.

        Raises:
            CorruptCacheError: One is.
        """
        try:
            for index in range(self._footer.num_row_groups):
                check_claims(self._footer.row_group(index), self.header.recipe)
        except _LIBRARY_ERRORS as error:
            raise _unreadable(self.path, error) from error

    def read_row_group(self, index: int) -> RowGroup:
        """Decode one row group.

        Raises:
            CorruptCacheError: Its bytes are damaged, it is larger than the format allows, or its
                rows are not T*K long.
        """
        table = self._read(index, self.header.recipe.columns)
        return RowGroup(table, self.header.recipe, f"{self.path}: row group {index}")

    def row_groups(self) -> Iterator[RowGroup]:
        """Yield the row groups, each decoded when it is asked for; raises as `read_row_group`."""
        return map(self.read_row_group, range(self._footer.num_row_groups))

    def read_identities(self, index: int) -> list[Identity]:
        """Return `(query_id, split, query)` of a row group's rows; decodes no signals.

        Raises:
            CorruptCacheError: As in `read_row_group`.
        """
        table = self._read(index, IDENTITY_COLUMNS)
        return Identities(table, f"{self.path}: row group {index}").identities()

    def _read(self, index: int, columns: Sequence[str]) -> pa.Table:
        try:
            table = self._file.read_row_group(index, columns=list(columns), use_threads=False)
            table = _as_stored(table, self.header.recipe.logit_dtype).combine_chunks()
            # Texts that are not UTF-8, offsets and dictionary indices that point nowhere.
            table.validate(full=True)
            if table.num_rows != self._footer.row_group(index).num_rows:
                raise ValueError(f"{table.num_rows} rows where the footer says otherwise")
        except _LIBRARY_ERRORS as error:
            raise _unreadable(self.path, error) from error
        return table

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _as_stored(table: pa.Table, logit_dtype: str) -> pa.Table:
    """Undo the wider types that other writers ask for, as `large_list`."""
    texts = pa.dictionary(pa.int32(), pa.string())
    items = {"logits": pa.type_for_alias(logit_dtype), "logsumexp": pa.float32()}
    for place, name in enumerate(table.column_names):
        column = table[name]
        if name in IDENTITY_COLUMNS:
            if column.type != texts:
                column = column.cast(pa.string()).dictionary_encode()
        else:
            kind = pa.list_(items.get(name, pa.int32()))
            if (column.type.id, column.type.value_type) != (kind.id, kind.value_type):
                column = column.cast(kind)
        table = table.set_column(place, name, column)
    return table


def _unreadable(path: Path, error: Exception) -> CorruptCacheError:
    if isinstance(error, MemoryError):
        raise error
    return CorruptCacheError(
        f"{path}: damaged shard ({first_line(error)[:160]}); get the cache again"
    )


def _read_metadata(
    path: Path, metadata: dict[bytes, bytes]
) -> tuple[ShardHeader, dict[str, SplitStatistics]]:
    try:
        version, known = metadata[_META_VERSION].decode(), list(map(str, FORMAT_VERSIONS))
        if version not in known:
            raise CorruptCacheError(f"format version {version[:20]}, expected {' or '.join(known)}")
        recipe = Recipe.from_json(parse_json(metadata[_META_RECIPE]))
        if version != str(recipe.version):
            raise CorruptCacheError(f"format version {version}, expected {recipe.version}")
        if metadata[_META_RECIPE_ID].decode() != recipe.recipe_id:
            raise CorruptCacheError("recipe id is not that of its recipe")
        engines = parse_json(metadata[_META_ENGINES])
        sums = parse_json(metadata[_META_STATISTICS])
        if not (
            isinstance(engines, list)
            and all(isinstance(engine, dict) for engine in engines)
            and isinstance(sums, dict)
        ):
            raise CorruptCacheError("metadata of the wrong type")
        header = ShardHeader(
            recipe=recipe,
            queries=metadata[_META_QUERIES].decode(),
            index=int(metadata[_META_INDEX]),
            count=int(metadata[_META_COUNT]),
            engines=tuple(engines),
        )
        return header, checked(_SUMS, {s: sums.get(s) for s in recipe.splits}, "statistics")
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{path}: {error}") from None
    except KeyError as error:
        key = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
        raise CorruptCacheError(
            f"{path}: not a shard of a teacher cache, its metadata lacks {key}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{path}: metadata is not readable ({error})") from error
