"""Decoded rows of a shard and the format's rules for them.

`check_claims` looks at what a row group says of itself, `RowGroup` at the shape of what came out,
and `row_group_problems` at the values.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from duet_unlearn.errors import CorruptCacheError
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import (
    COUNTS,
    IDENTITY_COLUMNS,
    MAX_PROMPT_TOKENS,
    MAX_QUERY_BYTES,
    MAX_QUERY_ID_BYTES,
    ROW_GROUP_PROMPT_TOKENS,
    ROW_GROUP_TEXT_BYTES,
    SPLITS,
    rows_per_group,
)

# Rounding a logit to float16 moves it by at most half a unit in the last place, 2**-11 of it.
_HALF_ULP = {"float16": 2.0**-11, "float32": 2.0**-24}
MAX_LOGIT = 1e6
"""No language model gives raw logits of this size; a loss on them would overflow."""
# Levels, dictionaries and page headers beside the values themselves.
_SLACK_BYTES = 1 << 20
_BYTES_A_VALUE = 16

Identity = tuple[str, str, str]
"""Query id, split and text of a row."""


def text_key(*parts: str) -> bytes:
    """Return 16 bytes that stand for some texts in memory."""
    text = "\0".join((str(len(parts[0])), *parts))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def check_claims(group: pq.RowGroupMetaData, recipe: Recipe) -> None:
    """Check that a row group says of itself that it keeps to the format's limits.

    Raises:
        ValueError: It does not, or uses an encoding that the format excludes.
    """
    rows = group.num_rows
    most = rows_per_group(recipe.top_k, recipe.positions)
    if not 0 < rows <= most:
        raise ValueError(f"a row group of {rows} rows, expected at most {most}")
    for index, name in enumerate(recipe.columns):
        column = group.column(index)
        values, size = _limits(name, rows, recipe)
        if not 0 <= column.num_values <= values:
            raise ValueError(f"{column.num_values} values in a column, expected at most {values}")
        if not 0 <= column.total_uncompressed_size <= size:
            raise ValueError(
                f"a column of {column.total_uncompressed_size} bytes, expected at most {size}"
            )
        if "DELTA_BYTE_ARRAY" in column.encodings:
            raise ValueError("a page in the encoding DELTA_BYTE_ARRAY, which the format excludes")


def _limits(column: str, rows: int, recipe: Recipe) -> tuple[int, int]:
    """Return the most values and uncompressed bytes of a column."""
    if column in IDENTITY_COLUMNS:
        return rows, ROW_GROUP_TEXT_BYTES + _BYTES_A_VALUE * rows + _SLACK_BYTES
    values = {
        "prompt_ids": ROW_GROUP_PROMPT_TOKENS,
        "response_ids": rows * recipe.positions,
        "logsumexp": rows * recipe.positions,
        COUNTS: rows * recipe.positions,
    }.get(column, rows * recipe.positions * recipe.top_k)
    return values, _BYTES_A_VALUE * values + _SLACK_BYTES


class Identities:
    """Id, split and text of consecutive rows; texts become Python objects when asked for.

    Raises:
        CorruptCacheError: A value is empty or too long, or a split is unknown.
    """

    def __init__(self, table: pa.Table, where: str) -> None:
        self._ids = _texts(table, "query_id", MAX_QUERY_ID_BYTES, where)
        self._queries = _texts(table, "query", MAX_QUERY_BYTES, where)
        splits = _texts(table, "split", 16, where)
        names = splits.dictionary.to_pylist()
        if unknown := set(names) - set(SPLITS):
            known = ", ".join(SPLITS)
            raise CorruptCacheError(f"{where}: split {min(unknown)!r}, expected one of {known}")
        codes = np.array([SPLITS.index(name) for name in names], np.uint8)
        self.split_codes: npt.NDArray[np.uint8] = codes[splits.indices.to_numpy()]
        """Split of each row, its place in `SPLITS`."""

    def query_id(self, row: int) -> str:
        """Return a row's query id."""
        return str(self._ids[row])

    def split(self, row: int) -> str:
        """Return a row's split."""
        return SPLITS[self.split_codes[row]]

    def query(self, row: int) -> str:
        """Return a row's query text."""
        return str(self._queries[row])

    def identities(self) -> list[Identity]:
        """Return `(query_id, split, query)` of all rows; equal texts share one object."""
        splits = [SPLITS[code] for code in self.split_codes.tolist()]
        return list(zip(_to_list(self._ids), splits, _to_list(self._queries), strict=True))


def _texts(table: pa.Table, name: str, limit: int, where: str) -> pa.DictionaryArray:
    array = table[name].chunk(0)
    if array.null_count or array.dictionary.null_count:
        raise CorruptCacheError(f"{where}: empty values in {name}; get the cache again")
    lengths = pc.binary_length(array.dictionary).to_numpy().astype(np.int64)
    longest = int(lengths.max(initial=0))
    together = int(lengths[array.indices.to_numpy()].sum())
    if longest > limit or together > ROW_GROUP_TEXT_BYTES:
        raise CorruptCacheError(
            f"{where}: a {name} of {longest} bytes, {together} together; the format takes {limit} "
            f"and {ROW_GROUP_TEXT_BYTES}; get the cache again"
        )
    return array


def _to_list(array: pa.DictionaryArray) -> list[str]:
    values = array.dictionary.to_pylist()
    return [values[index] for index in array.indices.to_pylist()]


class RowGroup(Identities):
    """Decoded columns of consecutive rows; the arrays are views of Arrow's memory.

    Of N positions of all rows, `token_ids` and `logits` are `[N, K]`, with empty places as in
    `Signal`, and `counts` `[N]` says how many of the K are not empty.
    """

    def __init__(self, table: pa.Table, recipe: Recipe, where: str) -> None:
        self.num_rows: int = table.num_rows
        self._top_k = recipe.top_k
        super().__init__(table, where)
        self.prompt_ids, self.prompt_offsets = _flatten(table, "prompt_ids", where)
        self.response_ids, self.response_offsets = _flatten(table, "response_ids", where)
        token_ids, token_offsets = _flatten(table, "token_ids", where)
        logits, logit_offsets = _flatten(table, "logits", where)
        self.logsumexp, lse_offsets = _flatten(table, "logsumexp", where)
        prompts = np.diff(self.prompt_offsets)
        if (prompts < 1).any() or (prompts > MAX_PROMPT_TOKENS).any():
            raise CorruptCacheError(
                f"{where}: a prompt that is empty or has more than {MAX_PROMPT_TOKENS} tokens"
            )
        if len(self.prompt_ids) > ROW_GROUP_PROMPT_TOKENS:
            raise CorruptCacheError(
                f"{where}: prompts of {len(self.prompt_ids)} tokens together, expected at most "
                f"{ROW_GROUP_PROMPT_TOKENS}"
            )
        lengths = np.diff(self.response_offsets)
        top_k, positions = recipe.top_k, len(self.response_ids)
        self.counts = np.full(positions, top_k, np.int64)
        count_offsets = self.response_offsets
        if COUNTS in recipe.columns:
            counts, count_offsets = _flatten(table, COUNTS, where)
            self.counts = counts.astype(np.int64)
        starts = np.pad(self.counts.clip(0, top_k).cumsum(), (1, 0))
        scaled = starts[self.response_offsets.clip(max=len(self.counts))]
        if (
            (lengths < 1).any()
            or (lengths > recipe.positions).any()
            or not np.array_equal(lse_offsets, self.response_offsets)
            or not np.array_equal(count_offsets, self.response_offsets)
            or (self.counts < 1).any()
            or (self.counts > top_k).any()
            or not np.array_equal(token_offsets, scaled)
            or not np.array_equal(logit_offsets, scaled)
        ):
            raise CorruptCacheError(
                f"{where}: rows are not T*K long (T up to {recipe.positions}, K "
                f"{'up to ' if COUNTS in recipe.columns else ''}{top_k}); get the cache again"
            )
        if COUNTS in recipe.columns:
            padded = np.repeat(token_ids[starts[:-1]][:, None], top_k, axis=1)
            padded[self.kept] = token_ids
            token_ids, values = padded, logits
            logits = np.full(padded.shape, -np.inf, values.dtype)
            logits[self.kept] = values
        self.token_ids = token_ids.reshape(-1, top_k)
        self.logits = logits.reshape(-1, top_k)

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Which places are not empty, `[N, K]`."""
        return np.arange(self._top_k) < self.counts[:, None]


def _flatten(
    table: pa.Table, name: str, where: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the values and the row offsets, starting at 0, of a list column of one chunk."""
    array = table[name].chunk(0)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    if array.null_count or values.null_count:
        raise CorruptCacheError(f"{where}: empty values in {name}; get the cache again")
    return values.to_numpy(), offsets - offsets[0]


def row_group_problems(group: RowGroup, recipe: Recipe) -> Iterator[str]:
    """Yield what breaks the format's rules in a row group, a short phrase each."""
    width = recipe.vocab_size
    for name in ("prompt_ids", "response_ids", "token_ids"):
        ids: npt.NDArray[np.int32] = getattr(group, name)
        if ids.size and not (ids.min() >= 0 and ids.max() < width):
            yield f"{name} outside the vocabulary of {width}"
    logits, kept = group.logits.astype(np.float32), group.kept
    if not (np.isfinite(logits[kept]).all() and np.isfinite(group.logsumexp).all()):
        yield "logits or logsumexp that are not finite"
        return
    largest = np.abs(np.where(kept, logits, 0.0)).max(axis=1)
    if float(largest.max(initial=0.0)) > MAX_LOGIT:
        yield f"logits beyond {MAX_LOGIT:g}"
    if (logits[:, 1:] > logits[:, :-1]).any():
        yield "logits that are not in descending order"
    token_ids = group.token_ids
    if COUNTS in recipe.columns:  # what stands in empty places is no second token
        others = np.int32(width) + np.arange(recipe.top_k, dtype=np.int32)
        token_ids = np.where(kept, token_ids, others)
    ordered = np.sort(token_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        yield "a token id twice at one position"
    slack = largest * _HALF_ULP[recipe.logit_dtype] + 1e-4
    if (group.logsumexp < logits[:, 0] - slack).any():
        yield "a logsumexp below the largest logit"
    if (group.logsumexp > logits[:, 0] + slack + math.log(width)).any():
        yield f"a logsumexp above what {width} such logits come to"
    if COUNTS in recipe.columns:
        with np.errstate(all="ignore"):
            most, least = (
                np.exp(logits + move - group.logsumexp[:, None]).sum(axis=1)
                for move in (slack[:, None], -slack[:, None])
            )
        if recipe.keep == "sampled":
            draws = math.log(recipe.top_k)
            known = (most >= 1 - 1e-3) & (least <= 1 + 1e-3)
            if not (known & (np.abs(group.logsumexp - draws) < 1e-3)).all():
                yield f"tokens of a position that are not {recipe.top_k} draws together"
        elif ((most < recipe.top_p - 1e-3) & (group.counts < recipe.top_k)).any():
            yield f"fewer tokens at a position than hold {recipe.top_p:g} of its mass"
    lengths = np.diff(group.response_offsets)
    last = group.response_ids[group.response_offsets[1:] - 1]
    # A response that was given ends where it ends.
    decoded = (lengths < recipe.positions) & (group.split_codes != SPLITS.index("train"))
    if (~np.isin(last[decoded], recipe.eos_token_ids)).any():
        yield "a response that ends early without an end-of-sequence token"
