"""Footers that lie: each is refused, or what they lie about is never looked at."""

import json
import runpy
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from duet_unlearn.errors import CacheError, CorruptCacheError
from duet_unlearn.teacher_cache.format import footer as footer_module
from duet_unlearn.teacher_cache.format.footer import parse_footer, read_footer
from duet_unlearn.teacher_cache.format.footer_writer import parquet_without_pages
from duet_unlearn.teacher_cache.format.schema import SHARD_COLUMNS
from duet_unlearn.teacher_cache.format.shard import ShardFile, _check_readable
from duet_unlearn.teacher_cache.format.thrift import (
    ListOf,
    Scalar,
    StructOf,
    i32,
    i64,
    list_of,
    read_struct,
    struct,
    text,
)

_TREE = runpy.run_path(str(Path(__file__).with_name("fuzz") / "thrift_tree.py"))
parse: Callable[[bytes], list[Any]] = _TREE["parse"]
pack: Callable[[list[Any]], bytes] = _TREE["pack"]

ROWS = [(f"q{i}", "forget" if i < 2 else "retain", f"query {i}") for i in range(4)]
BOOLEAN, BYTE, I32, I64, BINARY, LIST, STRUCT = 1, 3, 5, 6, 8, 9, 12


@pytest.fixture(params=["float16", "float32"])
def shard(cache_of_rows: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    """A sound shard of four rows, with logits in float16 or float32."""
    cache = cache_of_rows("cache", ROWS, logit_dtype=request.param)
    return cache / "shards" / "00000-of-00001.parquet"


def take_apart(shard: Path) -> tuple[bytes, list[Any]]:
    """Return a shard's bytes up to the footer, and the footer as a tree."""
    data = shard.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[:start], parse(data[start:-8])


def put_together(shard: Path, pages: bytes, tree: list[Any]) -> None:
    footer = pack(tree)
    shard.write_bytes(pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def at(tree: list[Any], *path: int) -> Any:
    """Follow field ids, and indices of lists, to a value."""
    for step in path:
        if tree and isinstance(tree[0], int):
            tree = tree[1][step]
        else:
            tree = next(value for number, _, value in tree if number == step)
    return tree


def put(tree: list[Any], *path: int, wire: int, value: Any) -> None:
    """Set or add a field of a struct; None takes it away."""
    *path_to_struct, number = path
    fields = at(tree, *path_to_struct)
    fields[:] = [entry for entry in fields if entry[0] != number]
    if value is not None:
        fields.append([number, wire, value])
        fields.sort(key=lambda entry: entry[0])


COLUMN = (4, 0, 1, 3, 3)
"""The description of `prompt_ids` in the first row group."""
QUERY = (4, 0, 1, 2, 3)
TEXT_ELEMENT, LIST_ELEMENT, MIDDLE_ELEMENT, LEAF_ELEMENT = (2, 3), (2, 4), (2, 5), (2, 6)


def test_a_sound_footer_says_the_same_to_us_and_to_the_library(shard: Path) -> None:
    with shard.open("rb") as file:
        footer = read_footer(file, shard.stat().st_size)
    library = pq.read_metadata(shard)
    assert footer.num_rows == library.num_rows == 4
    assert footer.metadata.items() >= {b"duet.shard_index": b"0"}.items()
    for column, name in enumerate(SHARD_COLUMNS):
        ours, theirs = footer.groups[0].columns[column], library.row_group(0).column(column)
        assert theirs.path_in_schema.split(".")[0] == name
        assert (ours.values, ours.length) == (theirs.num_values, theirs.total_compressed_size)
        assert ours.data_offset == theirs.data_page_offset


def test_what_the_library_gets_is_a_footer_of_ours(shard: Path, tmp_path: Path) -> None:
    with shard.open("rb") as file:
        footer = read_footer(file, shard.stat().st_size)
    written = tmp_path / "written.parquet"
    written.write_bytes(parquet_without_pages(footer))
    found = pq.read_metadata(written)
    assert found.metadata is None  # no Arrow schema, no texts
    assert found.row_group(0).column(0).statistics is None
    types = [str(kind) for kind in found.schema.to_arrow_schema().types]
    logits = "halffloat" if footer.logit_dtype == "float16" else "float"
    assert types == [
        *["string"] * 3,
        *["list<element: int32 not null>"] * 3,
        f"list<element: {logits} not null>",
        "list<element: float not null>",
    ]


def test_a_footer_that_ends_the_librarys_process_is_harmless(shard: Path) -> None:
    """More counts of definition levels than the column has levels: pyarrow 26 aborts."""
    pages, tree = take_apart(shard)
    at(tree, *COLUMN, 16, 3)[1].append(7)
    put_together(shard, pages, tree)
    command = "import sys, pathlib; from duet_unlearn.teacher_cache.format.shard import ShardFile; "
    command += "print(ShardFile(pathlib.Path(sys.argv[1])).read_row_group(0).num_rows)"
    result = subprocess.run(
        [sys.executable, "-c", command, str(shard)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "4\n"), result.stderr


def test_statistics_and_an_embedded_schema_are_passed_over(shard: Path) -> None:
    expected = ShardFile(shard).read_row_group(0)
    pages, tree = take_apart(shard)
    put(tree, *COLUMN, 12, wire=STRUCT, value=[[1, BINARY, b"\xff" * 9], [3, I64, -5]])
    put(tree, *COLUMN, 13, wire=LIST, value=[STRUCT, [[[1, I32, 99], [2, I32, 99]]]])
    for pair in at(tree, 5)[1]:
        if pair[0][2] == b"ARROW:schema":
            pair[1][2] = b"/////wAAAA" * 50
    put_together(shard, pages, tree)
    found = ShardFile(shard).read_row_group(0)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.query(3) == "query 3"


CONTRADICTIONS: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "more rows": (lambda t: put(t, 3, wire=I64, value=5), "5 rows whose row groups have 4"),
    "no rows": (lambda t: put(t, 3, wire=I64, value=None), "None rows whose row groups"),
    "negative rows": (lambda t: put(t, 4, 0, 3, wire=I64, value=-4), "a row group of -4 rows"),
    "more rows than bytes": (
        lambda t: put(t, 4, 0, 3, wire=I64, value=1 << 40),
        "a row group of 1099511627776 rows",
    ),
    "a column less": (lambda t: at(t, 4, 0, 1)[1].pop(), "4 rows and 7 columns"),
    "a column more": (
        lambda t: at(t, 4, 0, 1)[1].append(at(t, 4, 0, 1, 0)),
        "a Thrift list of 9 items, expected at most 8",
    ),
    "columns swapped": (lambda t: at(t, 4, 0, 1)[1].reverse(), "'query_id' that is not the schema"),
    "another type": (
        lambda t: put(t, *COLUMN, 1, wire=I32, value=2),
        "column 'prompt_ids' that is not the schema",
    ),
    "another path": (
        lambda t: put(t, *COLUMN, 3, wire=LIST, value=[BINARY, [b"logits", b"list", b"element"]]),
        "column 'prompt_ids' that is not the schema",
    ),
    "another file": (
        lambda t: put(t, 4, 0, 1, 0, 1, wire=BINARY, value=b"/etc/passwd"),
        "column 'query_id' that is not the schema",
    ),
    "no description": (
        lambda t: put(t, 4, 0, 1, 0, 3, wire=STRUCT, value=None),
        "column 'query_id' that is not the schema",
    ),
    "compression": (lambda t: put(t, *COLUMN, 4, wire=I32, value=3), "compression 3"),
    "unknown compression": (lambda t: put(t, *COLUMN, 4, wire=I32, value=8), "8 in field 4"),
    "negative size": (lambda t: put(t, *COLUMN, 6, wire=I64, value=-1), "-1 in field 6"),
    "negative length": (lambda t: put(t, *COLUMN, 7, wire=I64, value=-1), "-1 in field 7"),
    "no bytes": (lambda t: put(t, *COLUMN, 7, wire=I64, value=0), "outside the file's pages"),
    "behind the end": (lambda t: put(t, *COLUMN, 7, wire=I64, value=1 << 50), "in field 7"),
    "in the footer": (
        lambda t: put(t, *COLUMN, 7, wire=I64, value=at(t, *COLUMN, 7) + 100_000),
        "in field 7|outside the file's pages",
    ),
    "in the magic": (lambda t: put(t, *COLUMN, 9, wire=I64, value=2), "outside the file's pages"),
    "fewer values than rows": (
        lambda t: put(t, *COLUMN, 5, wire=I64, value=3),
        "3 values in 4 rows",
    ),
    "more texts than rows": (lambda t: put(t, *QUERY, 5, wire=I64, value=5), "5 values in 4 rows"),
    "a column of another name": (
        lambda t: put(t, *TEXT_ELEMENT, 4, wire=BINARY, value=b"answer"),
        "column 'answer', expected 'query'",
    ),
    "a number as text": (
        lambda t: put(t, *TEXT_ELEMENT, 1, wire=I32, value=1),
        "column 'query' is of another type",
    ),
    "bytes as text": (
        lambda t: [put(t, *TEXT_ELEMENT, n, wire=I32, value=None) for n in (6, 10)],
        "column 'query' is of another type",
    ),
    "unsigned": (
        lambda t: put(t, *LEAF_ELEMENT, 6, wire=I32, value=13),
        "column 'prompt_ids' is of another type",
    ),
    "64 bits": (
        lambda t: put(t, *LEAF_ELEMENT, 1, wire=I32, value=2),
        "column 'prompt_ids' is of another type",
    ),
    "a list of one": (
        lambda t: put(t, *MIDDLE_ELEMENT, 3, wire=I32, value=1),
        "column 'prompt_ids' is of another type",
    ),
    "repeated at the top": (
        lambda t: put(t, *LIST_ELEMENT, 3, wire=I32, value=2),
        "column 'prompt_ids' is of another type",
    ),
    "no children": (
        lambda t: put(t, *LIST_ELEMENT, 5, wire=I32, value=None),
        "column 'prompt_ids' is of another type",
    ),
    "an element more": (lambda t: at(t, 2)[1].append([[4, BINARY, b"more"]]), "beyond its columns"),
    "an element less": (lambda t: at(t, 2)[1].pop(), "column 'logsumexp', expected|''"),
    "another count of columns": (lambda t: put(t, 2, 0, 5, wire=I32, value=9), "other columns"),
    "no schema": (lambda t: put(t, 2, wire=LIST, value=None), "a schema of other columns"),
    "a number as list": (lambda t: put(t, 2, wire=I32, value=4), "wire type 5, expected a list"),
    "metadata twice": (lambda t: at(t, 5)[1].append(at(t, 5, 0)), "twice"),
}


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_footers_that_contradict_themselves_are_refused(
    shard: Path, change: Callable[[list[Any]], Any], message: str
) -> None:
    pages, tree = take_apart(shard)
    change(tree)
    put_together(shard, pages, tree)
    with pytest.raises(CorruptCacheError, match=message) as error:
        ShardFile(shard)
    assert str(error.value).startswith(f"{shard}: damaged shard (")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"PAR1PAR1", "8 bytes, too short"),
        (b"PAR1" + bytes(4) + b"PARE", "does not begin and end with PAR1"),
        (b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1", "a footer of 2147483647 bytes in a file of 12"),
        (b"PAR1" + bytes(4) + b"PAR1", "a Thrift struct that does not end"),
        (b"PAR1" + b"\0\0" + b"\2\0\0\0" + b"PAR1", "a footer of 1 bytes in a place of 2"),
    ],
)
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CorruptCacheError, match=message):
        ShardFile(tmp_path / "x")


def test_logits_of_another_width_than_the_recipes_are_refused(shard: Path) -> None:
    pages, tree = take_apart(shard)
    for pair in at(tree, 5)[1]:
        if pair[0][2] == b"duet.recipe":
            recipe = json.loads(pair[1][2])
            there = recipe["logit_dtype"]
            recipe["logit_dtype"] = "float32" if there == "float16" else "float16"
            pair[1][2] = json.dumps(recipe).encode()
        if pair[0][2] == b"duet.recipe_id":
            id_pair = pair
    from duet_unlearn.data.models.fingerprint import sha256_json

    id_pair[1][2] = sha256_json(recipe).encode()
    put_together(shard, pages, tree)
    with pytest.raises(CorruptCacheError, match=f"logits in {there}, its recipe says"):
        ShardFile(shard)


def test_a_shard_that_no_reader_would_take_is_not_kept(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footer_module, "MAX_FOOTER_BYTES", 1000)
    with pytest.raises(CacheError, match=r"expected at most 1000\); give a smaller --shard-rows"):
        _check_readable(shard, shard)


def test_a_footer_that_claims_all_it_can_is_read_in_little_memory() -> None:
    group = b"\x19\x8c" + bytes(8) + b"\0"  # eight columns that say nothing
    most = b"\x49\xfc\x80\x80\x01" + group * (1 << 14)
    tracemalloc.start()
    with pytest.raises(ValueError, match="a schema of other columns"):
        parse_footer(most + b"\0", 1 << 30)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    for data, message in (
        (b"\x49\xfc\x81\x80\x01" + group, "a Thrift list of 16385 items"),
        (most + b"\x59\xfc\xff\xff\xff\x7f", "does not end"),
        (most + b"\x59\xf8\x80\x80\x3c" + bytes(1_000_000), "in a place of"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_footer(data, 1 << 30)


HEADER = StructOf(
    {
        **dict.fromkeys((1, 2, 3), Scalar.INTEGER),
        5: StructOf({1: Scalar.INTEGER, 2: Scalar.INTEGER}),
        6: Scalar.BYTES,
        7: ListOf(Scalar.INTEGER, 2),
        8: Scalar.BOOLEAN,
    }
)


def test_a_page_header_is_read_as_the_thrift_compact_protocol_says() -> None:
    # Fields 1 to 3 and a struct in field 5, by hand: (delta << 4 | type), then zigzag numbers.
    header = bytes([0x15, 0, 0x15, 20, 0x15, 0xAC, 0x02, 0x2C, 0x15, 8, 0x15, 16, 0, 0])
    assert read_struct(header + b"rest", HEADER) == ({1: 0, 2: 10, 3: 150, 5: {1: 4, 2: 8}}, 14)


def test_all_kinds_of_values_are_read_and_others_passed_over() -> None:
    data = bytes([0x15, 0x01])  # 1: -1
    data += bytes([0x58, 2]) + b"ab"  # 6: bytes
    data += bytes([0x19, 0x25, 2, 4])  # 7: [1, 2]
    data += bytes([0x12])  # 8: false
    data += bytes([0x17]) + bytes(8)  # 9: a double
    data += bytes([0x1A, 0x11, 1])  # 10: a set of booleans
    data += bytes([0x19, 0x2C, 0, 0x11, 0])  # 11: [{}, {1: true}]
    data += bytes([0x03, 0x50, 0xFF, 0])  # 40: a byte
    fields, length = read_struct(data, HEADER)
    assert fields == {1: -1, 6: b"ab", 7: [1, 2], 8: False}
    assert length == len(data)


def test_what_is_written_is_read_again() -> None:
    data = struct(
        {
            1: i32(-(1 << 31)),
            2: i64((1 << 63) - 1),
            5: struct({1: i32(3)}),
            6: text(b"x" * 200),
        }
    ).data
    expected = {1: -(1 << 31), 2: (1 << 63) - 1, 5: {1: 3}, 6: b"x" * 200}
    assert read_struct(data, HEADER) == (expected, len(data))
    many = struct({1: list_of([i32(n) for n in range(20)])}).data
    kind = StructOf({1: ListOf(Scalar.INTEGER, 20)})
    assert read_struct(many, kind)[0] == {1: list(range(20))}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not end"),
        (b"\x15", "does not end"),
        (b"\x15\x02\x05\x02\x02\x00", "says field 1 twice"),
        (b"\x9c" + b"\x1c" * 50, "nested too deep"),
        (b"\x99" + b"\x19" * 50, "wire type 9"),
        (b"\x15" + b"\xff" * 11, "more than 64 bits"),
        (b"\x15" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x9b\x00", "wire type 11"),
        (b"\x9d\x00", "wire type 13"),
        (b"\x99\xf8\xff\xff\xff\x7f", "does not end"),
        (b"\x98\xff\x7f", "does not end"),
        (b"\x18\x01a\x00", "wire type 8, expected an integer"),
        (b"\x79\x35\x01\x01\x01\x00", "a Thrift list of 3 items, expected at most 2"),
        (b"\x59\x15\x00\x00", "wire type 9, expected a struct"),
    ],
)
def test_malformed_structs_are_value_errors(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_struct(data, HEADER)
