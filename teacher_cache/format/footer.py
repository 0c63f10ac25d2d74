"""The footer of a shard: read strictly, checked against the format, written anew for Parquet.

Parquet libraries believe a footer, and one that contradicts itself ends the process: pyarrow 26
aborts where a column's description and the schema disagree. So the library never sees the footer
of a file. It is read here, into the few values that decoding needs, each within its limits, and
what the library gets is a footer made of these values (`footer_writer`). Statistics, an
embedded Arrow schema and whatever else a footer may hold is passed over. See docs/decisions/0011.

Field numbers and enum values are those of parquet.thrift of the Apache Parquet format, 2.12.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from duet_unlearn.teacher_cache.format.schema import (
    IDENTITY_COLUMNS,
    MAX_FOOTER_BYTES,
    MAX_ROW_GROUPS,
    SHARD_COLUMNS,
)
from duet_unlearn.teacher_cache.format.thrift import (
    ListOf,
    Scalar,
    Struct,
    StructOf,
    read_struct,
)

MAGIC = b"PAR1"
_TAIL_BYTES = 8

# Physical types, repetitions, and the annotations that mean what our columns are.
_INT32, _FLOAT, _BYTE_ARRAY, FIXED_LENGTH = 1, 4, 6, 7
_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2
_UTF8, _LIST, _INT_32 = 0, 3, 17
_LOGICAL_STRING, _LOGICAL_LIST, _LOGICAL_INTEGER, _LOGICAL_FLOAT16 = 1, 3, 10, 15
# Uncompressed, Snappy, GZIP, Brotli, LZ4, Zstandard, LZ4_RAW.
_CODECS = (0, 1, 2, 4, 5, 6, 7)

_INTEGER, _BYTES = Scalar.INTEGER, Scalar.BYTES
_ANY = StructOf({})
_LOGICAL_TYPE = StructOf(
    {
        _LOGICAL_STRING: _ANY,
        _LOGICAL_LIST: _ANY,
        _LOGICAL_INTEGER: StructOf({1: _INTEGER, 2: Scalar.BOOLEAN}),
        _LOGICAL_FLOAT16: _ANY,
    }
)
_SCHEMA_ELEMENT = StructOf(
    {1: _INTEGER, 2: _INTEGER, 3: _INTEGER, 4: _BYTES, 5: _INTEGER, 6: _INTEGER, 10: _LOGICAL_TYPE}
)
_COLUMN = StructOf(
    {
        1: _BYTES,
        3: StructOf(
            {
                1: _INTEGER,
                3: ListOf(_BYTES, 3),
                **dict.fromkeys((4, 5, 6, 7, 9, 11), _INTEGER),
            }
        ),
    }
)
_ROW_GROUP = StructOf({1: ListOf(_COLUMN, len(SHARD_COLUMNS)), 3: _INTEGER})
_FILE = StructOf(
    {
        2: ListOf(_SCHEMA_ELEMENT, 32),
        3: _INTEGER,
        4: ListOf(_ROW_GROUP, MAX_ROW_GROUPS),
        5: ListOf(StructOf({1: _BYTES, 2: _BYTES}), 256),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemaNode:
    """One element of the schema; a group has children, a leaf a physical type."""

    name: bytes
    repetition: int
    physical: int | None = None
    converted: int | None = None
    logical: int | None = None
    children: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnChunk:
    """Where the pages of one column of a row group lie, and what the footer says of them."""

    codec: int
    values: int
    """Values of all lists together, an empty list counted as one."""
    data_offset: int
    dictionary_offset: int | None
    """Of the dictionary page, where one stands in front of the data pages."""
    length: int
    """Compressed bytes, dictionary and page headers included."""
    size: int
    """Uncompressed bytes, as the footer claims."""

    @property
    def start(self) -> int:
        """Where the first page begins."""
        return self.data_offset if self.dictionary_offset is None else self.dictionary_offset


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlace:
    """A row group: its rows, and a chunk for each of the format's columns."""

    rows: int
    columns: tuple[ColumnChunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Footer:
    """What a shard's footer says, as far as it is believed."""

    nodes: tuple[tuple[SchemaNode, ...], ...]
    """For each column the elements from the top to the leaf, with names of our own below it."""
    groups: tuple[GroupPlace, ...]
    metadata: dict[bytes, bytes]
    """The file's key-value metadata."""

    @property
    def num_rows(self) -> int:
        """Rows of all row groups."""
        return sum(group.rows for group in self.groups)

    @property
    def logit_dtype(self) -> str:
        """`float16` or `float32`: how logits are stored."""
        leaf = self.nodes[SHARD_COLUMNS.index("logits")][-1]
        return "float16" if leaf.physical == FIXED_LENGTH else "float32"


def read_footer(file: BinaryIO, size: int) -> Footer:
    """Read and check the footer of a shard.

    Args:
        file: The shard, open for reading.
        size: Its length in bytes.

    Raises:
        ValueError: It is no Parquet file, its footer contradicts itself or the file, or its
            columns are not those of the format.
        OSError: The file cannot be read.
    """
    if size < len(MAGIC) + _TAIL_BYTES:
        raise ValueError(f"{size} bytes, too short for a Parquet file")
    file.seek(0)
    magic = bytes(file.read(len(MAGIC)))
    file.seek(size - _TAIL_BYTES)
    tail = bytes(file.read(_TAIL_BYTES))
    if not magic == tail[4:] == MAGIC:
        raise ValueError("no Parquet file: it does not begin and end with PAR1")
    length = int.from_bytes(tail[:4], "little")
    end = size - _TAIL_BYTES - length
    if length > MAX_FOOTER_BYTES or end < len(MAGIC):
        raise ValueError(
            f"a footer of {length} bytes in a file of {size}, expected at most {MAX_FOOTER_BYTES}"
        )
    file.seek(end)
    return parse_footer(bytes(file.read(length)), end)


def parse_footer(data: bytes, end: int) -> Footer:
    """Check the footer of a file whose pages lie below `end`; see `read_footer`.

    Raises:
        ValueError: It contradicts itself or the file, or its columns are not the format's.
    """
    fields, length = read_struct(data, _FILE)
    if length != len(data):
        raise ValueError(f"a footer of {length} bytes in a place of {len(data)}")
    nodes, paths = _schema(fields.get(2, []))
    columns = [(column[-1].physical, path) for column, path in zip(nodes, paths, strict=True)]
    groups = tuple(_row_group(group, columns, end) for group in fields.get(4, []))
    footer = Footer(nodes=nodes, groups=groups, metadata=_metadata(fields.get(5, [])))
    if not groups or fields.get(3) != footer.num_rows:
        raise ValueError(
            f"a footer of {fields.get(3)} rows whose row groups have {footer.num_rows}"
        )
    return footer


def _schema(
    elements: Sequence[Struct],
) -> tuple[tuple[tuple[SchemaNode, ...], ...], list[list[bytes]]]:
    """Return the elements of each column, and the names by which its chunks are found."""
    if not elements or elements[0].get(5) != len(SHARD_COLUMNS):
        raise ValueError(f"a schema of other columns than {', '.join(SHARD_COLUMNS)}")
    waiting = iter(elements[1:])
    columns, paths = [], []
    for name in SHARD_COLUMNS:
        depth = 1 if name in IDENTITY_COLUMNS else 3
        parts = list(itertools.islice(waiting, depth))
        if len(parts) < depth or parts[0].get(4) != name.encode():
            found = bytes(parts[0].get(4, b""))[:40] if parts else b""
            raise ValueError(f"column {found.decode(errors='replace')!r}, expected {name!r}")
        check = _is_text if depth == 1 else _is_list
        if not check(parts, _LEAVES.get(name, _is_int32)):
            raise ValueError(f"column {name!r} is of another type than the format's")
        columns.append(tuple(_NODES[depth](parts)))
        paths.append([part.get(4, b"") for part in parts])
    if next(waiting, None) is not None:
        raise ValueError("a schema with elements beyond its columns")
    return tuple(columns), paths


def _is_text(parts: Sequence[Struct], _: Callable[[Struct], bool]) -> bool:
    (leaf,) = parts
    return (
        leaf.get(1) == _BYTE_ARRAY
        and leaf.get(3) in (_REQUIRED, _OPTIONAL)
        and not leaf.get(5)
        and (leaf.get(6) == _UTF8 or _LOGICAL_STRING in leaf.get(10, {}))
    )


def _is_list(parts: Sequence[Struct], is_leaf: Callable[[Struct], bool]) -> bool:
    outer, middle, leaf = parts
    return (
        1 not in outer
        and outer.get(3) in (_REQUIRED, _OPTIONAL)
        and outer.get(5) == 1
        and (outer.get(6) == _LIST or _LOGICAL_LIST in outer.get(10, {}))
        and 1 not in middle
        and middle.get(3) == _REPEATED
        and middle.get(5) == 1
        and leaf.get(3) in (_REQUIRED, _OPTIONAL)
        and not leaf.get(5)
        and is_leaf(leaf)
    )


def _is_int32(leaf: Struct) -> bool:
    signed = {_LOGICAL_INTEGER: {1: 32, 2: True}}
    return (
        leaf.get(1) == _INT32
        and leaf.get(6) in (None, _INT_32)
        and leaf.get(10, signed) in (signed, {})
    )


def _is_float32(leaf: Struct) -> bool:
    return leaf.get(1) == _FLOAT and 6 not in leaf


def _is_logit(leaf: Struct) -> bool:
    half = leaf.get(1) == FIXED_LENGTH and leaf.get(2) == 2 and _LOGICAL_FLOAT16 in leaf.get(10, {})
    return half or _is_float32(leaf)


_LEAVES: dict[str, Callable[[Struct], bool]] = {"logits": _is_logit, "logsumexp": _is_float32}


def _text_nodes(parts: Sequence[Struct]) -> list[SchemaNode]:
    (leaf,) = parts
    return [
        SchemaNode(
            name=leaf[4],
            repetition=leaf[3],
            physical=_BYTE_ARRAY,
            converted=_UTF8,
            logical=_LOGICAL_STRING,
        )
    ]


def _list_nodes(parts: Sequence[Struct]) -> list[SchemaNode]:
    outer, _, leaf = parts
    return [
        SchemaNode(
            name=outer[4],
            repetition=outer[3],
            converted=_LIST,
            logical=_LOGICAL_LIST,
            children=1,
        ),
        SchemaNode(name=b"list", repetition=_REPEATED, children=1),
        SchemaNode(
            name=b"element",
            repetition=leaf[3],
            physical=leaf[1],
            logical=_LOGICAL_FLOAT16 if leaf[1] == FIXED_LENGTH else None,
        ),
    ]


_NODES: dict[int, Callable[[Sequence[Struct]], list[SchemaNode]]] = {1: _text_nodes, 3: _list_nodes}


def _row_group(
    fields: Struct, columns: Sequence[tuple[int | None, list[bytes]]], end: int
) -> GroupPlace:
    rows, chunks = fields.get(3), fields.get(1, [])
    if not isinstance(rows, int) or not 0 < rows <= end or len(chunks) != len(columns):
        raise ValueError(f"a row group of {rows} rows and {len(chunks)} columns")
    return GroupPlace(
        rows=rows,
        columns=tuple(
            _column(chunk, rows, physical, path, end)
            for chunk, (physical, path) in zip(chunks, columns, strict=True)
        ),
    )


def _column(
    fields: Struct, rows: int, physical: int | None, path: list[bytes], end: int
) -> ColumnChunk:
    meta: Struct = fields.get(3, {})
    name = path[0].decode()
    if fields.get(1) or meta.get(1) != physical or meta.get(3) != path:
        raise ValueError(f"a description of column {name!r} that is not the schema's")
    codec, values, size, length, data_offset = (
        _within(meta, number, name, limit)
        for number, limit in ((4, 7), (5, 1 << 40), (6, 1 << 40), (7, end), (9, end))
    )
    dictionary: int | None = meta.get(11)
    if dictionary is not None and not 0 < dictionary < data_offset:
        dictionary = None  # some writers say 0 where there is none
    chunk = ColumnChunk(
        codec=codec,
        values=values,
        data_offset=data_offset,
        dictionary_offset=dictionary,
        length=length,
        size=size,
    )
    if chunk.start < len(MAGIC) or length < 1 or chunk.start + length > end:
        raise ValueError(f"column {name!r} lies outside the file's pages")
    if codec not in _CODECS:
        raise ValueError(f"column {name!r} with compression {codec}, which no shard uses")
    if values < rows or (len(path) == 1 and values > rows):
        raise ValueError(f"column {name!r} has {values} values in {rows} rows")
    return chunk


def _within(fields: Struct, number: int, name: str, limit: int) -> int:
    value: Any = fields.get(number)
    if not isinstance(value, int) or not 0 <= value <= limit:
        raise ValueError(f"a description of column {name!r} with {value} in field {number}")
    return value


def _metadata(pairs: Sequence[Struct]) -> dict[bytes, bytes]:
    metadata: dict[bytes, bytes] = {}
    for pair in pairs:
        key = pair.get(1, b"")
        if key in metadata:
            raise ValueError(f"metadata that names {key[:40]!r} twice")
        metadata[key] = pair.get(2, b"")
    return metadata
