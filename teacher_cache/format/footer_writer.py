"""The footer that a Parquet library gets to see: made anew of what was checked of a shard's own."""

from collections.abc import Sequence

from duet_unlearn.teacher_cache.format.footer import (
    FIXED_LENGTH,
    MAGIC,
    ColumnChunk,
    Footer,
    GroupPlace,
    SchemaNode,
)
from duet_unlearn.teacher_cache.format.schema import SHARD_COLUMNS
from duet_unlearn.teacher_cache.format.thrift import Encoded, i32, i64, list_of, struct, text


def parquet_without_pages(footer: Footer) -> bytes:
    """Return a Parquet file without pages whose footer says this, and nothing else."""
    root = struct({4: text(b"schema"), 5: i32(len(SHARD_COLUMNS))})
    elements = [_element(node) for column in footer.nodes for node in column]
    groups = [_group(group, footer.nodes) for group in footer.groups]
    written = struct(
        {
            1: i32(2),
            2: list_of([root, *elements]),
            3: i64(footer.num_rows),
            4: list_of(groups),
        }
    ).data
    return MAGIC + written + len(written).to_bytes(4, "little") + MAGIC


def _group(group: GroupPlace, nodes: Sequence[Sequence[SchemaNode]]) -> Encoded:
    columns = [_chunk(chunk, column) for chunk, column in zip(group.columns, nodes, strict=True)]
    size = sum(chunk.size for chunk in group.columns)
    return struct({1: list_of(columns), 2: i64(size), 3: i64(group.rows)})


def _element(node: SchemaNode) -> Encoded:
    fields = {3: i32(node.repetition), 4: text(node.name)}
    if node.physical is not None:
        fields[1] = i32(node.physical)
    if node.physical == FIXED_LENGTH:
        fields[2] = i32(2)
    if node.children:
        fields[5] = i32(node.children)
    if node.converted is not None:
        fields[6] = i32(node.converted)
    if node.logical is not None:
        fields[10] = struct({node.logical: struct({})})
    return struct(fields)


def _chunk(chunk: ColumnChunk, nodes: Sequence[SchemaNode]) -> Encoded:
    fields = {
        1: i32(nodes[-1].physical or 0),
        # Which encodings there are is in the pages; plain ones are what the list has to name.
        2: list_of([i32(0), i32(3)]),
        3: list_of([text(node.name) for node in nodes]),
        4: i32(chunk.codec),
        5: i64(chunk.values),
        6: i64(chunk.size),
        7: i64(chunk.length),
        9: i64(chunk.data_offset),
    }
    if chunk.dictionary_offset is not None:
        fields[11] = i64(chunk.dictionary_offset)
    return struct({2: i64(0), 3: struct(fields)})
