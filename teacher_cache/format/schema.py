"""Names, limits and columns of a shard, in all versions of the format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from duet_unlearn.teacher_cache.format.signal import Signal

FORMAT_VERSIONS = (1, 2, 3)
"""What is read; `Recipe.version` says which of them a cache is."""
SPLITS = ("forget", "retain", "train")
"""Version 1 has the first two."""

KEEPS = ("strongest", "sampled")
"""Which tokens positions have."""

MANIFEST_NAME = "manifest.json"
SHARD_FOLDER = "shards"

# Row groups are what a reader decodes at once: about 2**20 logits keep one at a few megabytes
# whatever T and K are.
ROW_GROUP_LOGITS = 1 << 20
ROW_GROUP_ROWS = 1 << 14
ROW_GROUP_PROMPT_TOKENS = 1 << 22
ROW_GROUP_TEXT_BYTES = 1 << 24

# Limits of one row. A group may hold a single row of any size within them, so none of them is
# larger than what a reader can afford to decode at once.
MAX_QUERY_ID_BYTES = 1 << 12
MAX_QUERY_BYTES = ROW_GROUP_TEXT_BYTES
MAX_PROMPT_TOKENS = 1 << 20
# Limits of a shard and of a cache: a reader keeps an entry a row and a row group in memory.
MAX_SHARD_ROW_GROUPS = 1 << 14
MAX_ROW_GROUPS = 1 << 22
MAX_ROWS = 1 << 28

SHARD_COLUMNS = (
    "query_id",
    "split",
    "query",
    "prompt_ids",
    "response_ids",
    "token_ids",
    "logits",
    "logsumexp",
)
COUNTS = "counts"
"""One column more, where positions have different numbers of tokens."""
IDENTITY_COLUMNS = SHARD_COLUMNS[:3]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRow:
    """One query with its signal, as written to and read from a shard."""

    query_id: str
    """Stable id of the query."""
    split: str
    """`forget`, `retain` or `train`."""
    query: str
    """The text as the student sees it; for several messages their JSON."""
    prompt_ids: npt.NDArray[np.int32]
    """The student's prompt, `[P]`: chat template applied, no prefix."""
    signal: Signal
    """What the teacher said, T positions of K tokens."""


def shard_schema(logit_dtype: str, columns: Sequence[str]) -> pa.Schema:
    """Return the columns of a shard, those of its recipe in order.

    No value is null, and the schema says so: readers then decode fewer levels.
    """
    kinds = {
        "query_id": pa.string(),
        "split": pa.dictionary(pa.int32(), pa.string()),
        "query": pa.string(),
        "prompt_ids": _list_type(pa.int32()),
        "response_ids": _list_type(pa.int32()),
        "token_ids": _list_type(pa.int32()),
        "logits": _list_type(pa.type_for_alias(logit_dtype)),
        "logsumexp": _list_type(pa.float32()),
        COUNTS: _list_type(pa.int32()),
    }
    return pa.schema([pa.field(name, kinds[name], nullable=False) for name in columns])


def _list_type(item: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", item, nullable=False))


def rows_to_table(rows: Sequence[CacheRow], logit_dtype: str, columns: Sequence[str]) -> pa.Table:
    """Return rows as an Arrow table; matrices `[T, K]` go row-major, without empty places."""
    schema = shard_schema(logit_dtype, columns)
    signals = [row.signal for row in rows]
    kept = [signal.logits > -np.inf for signal in signals]
    lists: dict[str, list[npt.NDArray[Any]]] = {
        "prompt_ids": [row.prompt_ids for row in rows],
        "response_ids": [signal.response_ids for signal in signals],
        "token_ids": [s.token_ids[mask] for s, mask in zip(signals, kept, strict=True)],
        "logits": [s.logits[mask] for s, mask in zip(signals, kept, strict=True)],
        "logsumexp": [signal.logsumexp for signal in signals],
        COUNTS: [mask.sum(axis=1) for mask in kept],
    }
    lists = {name: lists[name] for name in columns[len(IDENTITY_COLUMNS) :]}
    arrays = [
        pa.array([row.query_id for row in rows], pa.string()),
        pa.array([row.split for row in rows], pa.string()).dictionary_encode(),
        pa.array([row.query for row in rows], pa.string()),
        *(_list_column(values, schema.field(name).type) for name, values in lists.items()),
    ]
    return pa.table(arrays, schema=schema)


def _list_column(arrays: Sequence[npt.NDArray[Any]], kind: pa.ListType) -> pa.ListArray:
    dtype = kind.value_type.to_pandas_dtype()
    offsets = np.cumsum([0, *map(len, arrays)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} list entries in one shard, more than a Parquet list holds")
    flat = np.concatenate(arrays).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat), type=kind)


def rows_per_group(top_k: int, positions: int) -> int:
    """Return the most rows a row group may hold, so that it decodes to a few megabytes."""
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_LOGITS // (top_k * positions)))


def row_group_rows(rows: Sequence[CacheRow], top_k: int, positions: int) -> int:
    """Return how many of these rows a row group holds: fewer where prompts or texts are long."""
    prompt = max(len(row.prompt_ids) for row in rows)
    text = max(len(text.encode()) for row in rows for text in (row.query, row.query_id))
    fitting = min(ROW_GROUP_PROMPT_TOKENS // max(1, prompt), ROW_GROUP_TEXT_BYTES // max(1, text))
    return max(1, min(rows_per_group(top_k, positions), fitting))
