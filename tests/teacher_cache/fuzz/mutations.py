"""Ways to damage or forge a cache; each changes the folder it is given."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from base import list_in_manifest, plain_shard, shard_of, sign
from footers import footer_fields, page_headers
from thrift_tree import varint

from duet_unlearn.data.models.fingerprint import sha256_json

SIZES = (0, 1, -1, 2, 3, 255, 1 << 16, 1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 62, 1 << 70)
NUMBERS = (0, -1, 1, 89, 90, 2**31 - 1, -(2**31), 3e38, -3e38, 65504.0, float("nan"), float("inf"))
TEXTS = ("", "x" * 100_000, "../../etc/passwd", "\0", "\x1b[2J", "\ud800", "sha256:" + "0" * 64)
HOSTILE: tuple[Any, ...] = (
    *SIZES,
    *TEXTS,
    *(None, True, False, 1e308, 0.5, -0.0, float("nan"), float("inf")),
    *([], {}, [[]], {"a": 1}, [1, 2, 3], ["x"], [{}] * 3),
)


def mutate_bytes(data: bytes, rng: random.Random, first: int = 0) -> bytes:
    """Flip, overwrite, insert, delete, repeat or cut some bytes from `first` on."""
    changed = bytearray(data or b"0")
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(first, max(first + 1, len(changed)))
        length = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            changed[at:at] = rng.choice((b"\xff", b"\x00", b"\x80", b"[", b'"', b"9")) * length
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif at < len(changed):
            # The largest numbers of a variable-length encoding.
            changed[at] = rng.choice((0x7F, 0x80, 0xFE, 0xFF))
    stop = len(changed) if rng.random() > 0.05 else rng.randrange(len(changed) + 1)
    return bytes(changed[:stop])


def manifest_bytes(cache: Path, rng: random.Random) -> None:
    path = cache / "manifest.json"
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def manifest_text(cache: Path, rng: random.Random) -> None:
    path = cache / "manifest.json"
    text = path.read_text()
    deep = rng.choice((50, 900, 5000, 100_000))
    value = rng.choice(
        ("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, "9" * deep, "1e999", "NaN")
    )
    name = rng.choice(("teacher", "top_k", "rows", "bytes", "engine", "mass", "format_version"))
    place = text.find(f'"{name}": ') + len(name) + 4
    if rng.random() < 0.3:
        path.write_text(text.replace("{", '{"format": 1, "format": 2, "a": 1, "a": 2,', 1))
    elif rng.random() < 0.5:
        path.write_text(text[:place] + value + "," + text[place:])
    else:
        path.write_text(value)


def replace_somewhere(value: Any, rng: random.Random) -> Any:
    """Return JSON values with one of them replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.06:
            del changed[key]
        elif rng.random() < 0.06:
            changed[rng.choice(("x", "\ud800", "../x"))] = changed.pop(key)
        else:
            changed[key] = replace_somewhere(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value * rng.choice((0, 2, 1000))
        return [*value[:at], replace_somewhere(value[at], rng), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 1 << 10, 1 << 20, 1 << 31))
    return rng.choice(HOSTILE)


def manifest_values(cache: Path, rng: random.Random) -> None:
    value = json.loads((cache / "manifest.json").read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = replace_somewhere(value, rng)
    if isinstance(value, dict) and rng.random() < 0.7 and "recipe" in value:
        value["recipe_id"] = sha256_json(value["recipe"])
    if isinstance(value, dict):
        sign(cache, value)
    else:
        (cache / "manifest.json").write_text(json.dumps(value))


def shard_bytes(cache: Path, rng: random.Random) -> None:
    path = shard_of(cache, rng)
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    if rng.random() < 0.9:
        list_in_manifest(cache)


def footer_bytes(cache: Path, rng: random.Random) -> None:
    path = shard_of(cache, rng)
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = mutate_bytes(data[start:-8], rng)
    path.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    list_in_manifest(cache)


def page_bytes(cache: Path, rng: random.Random) -> None:
    """Change bytes of one column's pages, without checksums that would catch it."""
    plain_shard(cache, rng)
    path = shard_of(cache, rng)
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = group.column(rng.randrange(group.num_columns))
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = start + rng.randrange(column.total_compressed_size)
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, data[at] ^ 1, rng.randrange(256)))
    path.write_bytes(bytes(data))
    list_in_manifest(cache)


def shard_metadata(cache: Path, rng: random.Random) -> None:
    path = shard_of(cache, rng)
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    key = rng.choice(sorted(k for k in metadata if k.startswith(b"duet.")))
    if rng.random() < 0.1:
        del metadata[key]
    elif rng.random() < 0.5:
        metadata[key] = mutate_bytes(metadata[key], rng)
    else:
        try:
            value = json.loads(metadata[key])
        except ValueError:
            value = 1
        text = json.dumps(replace_somewhere(value, rng))
        metadata[key] = text.encode()
        if key == b"duet.recipe" and rng.random() < 0.8:
            metadata[b"duet.recipe_id"] = sha256_json(json.loads(text)).encode()
    pq.write_table(table.replace_schema_metadata(metadata), path)
    list_in_manifest(cache)


def shard_columns(cache: Path, rng: random.Random) -> None:
    """Write a column of hostile values, or of another type, as sound Parquet."""
    path = shard_of(cache, rng)
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    column = hostile_column(table[name].to_pylist(), table.schema.field(name).type, rng)
    at = table.schema.get_field_index(name)
    table = table.set_column(at, pa.field(name, column.type), column)
    if rng.random() < 0.1:
        table = pa.concat_tables([table] * 3)
    if rng.random() < 0.1:
        table = table.select(rng.sample(table.column_names, rng.randrange(1, 8)))
    pq.write_table(table, path, row_group_size=rng.choice((1, 2, 4, 100)))
    list_in_manifest(cache)


def hostile_column(values: list[Any], kind: pa.DataType, rng: random.Random) -> pa.Array:
    row = rng.randrange(len(values))
    if isinstance(values[row], list):
        kind = pa.list_(kind.value_type)  # ours says that no item is null
        change = rng.randrange(7)
        number = rng.choice(NUMBERS)
        if pa.types.is_integer(kind.value_type):
            number = number if isinstance(number, int) else 5
        else:
            with np.errstate(over="ignore"):
                number = np.dtype(kind.value_type.to_pandas_dtype()).type(number)
        if change == 0:
            values[row] = [number] * rng.choice((0, 1, 2, 8, 9, 100_000, 6_000_000))
        elif change == 1:
            values[row] = None
        elif change == 2:
            values[row] = [None, *values[row][1:]]
        elif change == 3:
            values[row] = values[row][: rng.randrange(len(values[row]))]
        elif change == 4:
            kind = rng.choice(
                (pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.string()))
            )
            values = (
                [[1, 2]] * len(values) if kind.value_type != pa.string() else [["a"]] * len(values)
            )
        elif change == 5:
            return pa.array([b"binary"] * len(values))
        else:
            values[row] = [number, *values[row][1:]]
        return pa.array(values, kind)
    change = rng.randrange(6)
    if change == 0:
        values[row] = None
    elif change == 1:
        values[row] = "y" * rng.choice((1 << 12, (1 << 12) + 1, 1 << 20, (1 << 24) + 1))
    elif change == 2:
        return pa.array(values, rng.choice((pa.large_string(), pa.string(), pa.binary())))
    elif change == 3:
        # Text that is no UTF-8; Arrow only finds out when asked to look.
        text = b"\xff\xfe" * len(values)
        offsets = np.arange(len(values) + 1, dtype=np.int32) * 2
        return pa.Array.from_buffers(
            pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        )
    elif change == 4:
        return pa.array([1] * len(values))
    else:
        values[row] = rng.choice(("", "other", "forget", "q1", "\0", "\x1b[31m"))
    return pa.array(values, pa.string())


def bomb(cache: Path, rng: random.Random) -> None:
    """A few hundred bytes that decode to a very long list, or to one text over and over."""
    path = shard_of(cache, rng)
    table = pq.read_table(path)
    rows = table.num_rows
    if rng.random() < 0.5:
        name = rng.choice(("prompt_ids", "response_ids", "token_ids"))
        count = rng.choice((1 << 20, 5_000_000))
        values = np.full(count * rows, 7, np.int32)
        offsets = np.arange(rows + 1, dtype=np.int32) * count
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    else:
        name = rng.choice(("query", "query_id"))
        column = pa.array(["z" * (1 << 22)] * rows)
    at = table.schema.get_field_index(name)
    table = table.set_column(at, pa.field(name, column.type), column)
    pq.write_table(table, path, compression="zstd")
    data = path.read_bytes()
    if rng.random() < 0.5:
        data = forge_counts(data, rng)
    path.write_bytes(data)
    list_in_manifest(cache)


def forge_counts(data: bytes, rng: random.Random) -> bytes:
    """Let the footer claim a small number where it says a large one, in as many bytes."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for column in range(8):
        chunk = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(column)
        if chunk.num_values > 1000:
            claim = rng.choice((1, 4, 8, 100))
            old = varint(2 * chunk.num_values)
            new = varint(2 * claim, pad=len(old))
            data = data[:start] + data[start:].replace(old, new)
    return data


MUTATIONS: tuple[tuple[Callable[[Path, random.Random], None], int], ...] = (
    (manifest_bytes, 2),
    (manifest_text, 1),
    (manifest_values, 5),
    (shard_bytes, 3),
    (footer_bytes, 4),
    (footer_fields, 6),
    (page_bytes, 4),
    (page_headers, 3),
    (shard_metadata, 3),
    (shard_columns, 4),
    (bomb, 1),
)
