"""Mutations that know Thrift: well-formed footers and page headers that say something else."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from base import list_in_manifest, plain_shard, shard_of
from thrift_tree import BINARY, I32, INTEGERS, LIST, STRUCT, Fields, is_list, is_struct, pack, parse

_NUMBERS = (0, 1, -1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 40)
_TEXTS = (b"", b"list", b"element", b"query", b"logits", b"\xff", b"x" * 5000, b"a.b")

# A place in a tree: how to read what stands there, and how to replace it.
_Slot = tuple[list[Any], int]


def read_footer(data: bytes) -> tuple[int, Fields]:
    """Return where a file's footer begins, and the footer."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return start, parse(data[start:-8])


def with_footer(pages: bytes, footer: bytes) -> bytes:
    """Return a Parquet file of some pages, the magic in front included, and a footer."""
    return pages + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def field(fields: Fields, number: int) -> Any:
    """Return a struct's field by its id."""
    return next(value for found, _, value in fields if found == number)


def footer_fields(cache: Path, rng: random.Random) -> None:
    """Change some fields anywhere in a footer; what is written is well-formed Thrift, mostly."""
    if rng.random() < 0.3:
        plain_shard(cache, rng)
    path = shard_of(cache, rng)
    data = path.read_bytes()
    start, footer = read_footer(data)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 5))):
        change(footer, rng)
    path.write_bytes(with_footer(data[:start], pack(footer)))
    list_in_manifest(cache)


def page_headers(cache: Path, rng: random.Random) -> None:
    """Change a field of a page header, and move everything behind it to where it now is."""
    plain_shard(cache, rng)
    path = shard_of(cache, rng)
    data = path.read_bytes()
    start, footer = read_footer(data)
    columns = field(field(footer, 4)[1][0], 1)[1]
    places = [field(column, 3) for column in columns]
    at = rng.choice([_first_page(place) for place in places])
    header = parse(data[at:])
    length = len(pack(header))
    for _ in range(rng.choice((1, 1, 2))):
        change(header, rng)
    new = pack(header)
    for place in places:
        if _first_page(place) == at:
            _set(place, 7, lambda size: size + len(new) - length)
        for number in (9, 11):
            _set(place, number, lambda offset: offset + (len(new) - length) * (offset > at))
    pages = data[:at] + new + data[at + length : start]
    path.write_bytes(with_footer(pages, pack(footer)))
    list_in_manifest(cache)


def _first_page(place: Fields) -> int:
    return min(value for number, _, value in place if number in (9, 11))


def _set(fields: Fields, number: int, change: Callable[[int], int]) -> None:
    for entry in fields:
        if entry[0] == number:
            entry[2] = change(entry[2])


def change(fields: Fields, rng: random.Random) -> None:
    """Change one thing in a struct: a value, a type, an id, an item more, less or elsewhere."""
    structs, lists, numbers, texts = _collect(fields)
    kind = rng.randrange(8)
    if kind <= 2 and numbers:
        holder, at = rng.choice(numbers)
        other, place = rng.choice(numbers)
        near = holder[at] + rng.choice((-1, 1, 2, 1000))
        holder[at] = rng.choice((near, other[place], rng.choice(_NUMBERS), -holder[at]))
    elif kind == 3 and texts:
        holder, at = rng.choice(texts)
        other, place = rng.choice(texts)
        holder[at] = rng.choice((other[place], rng.choice(_TEXTS)))
    elif kind == 4:
        entries = rng.choice(structs)
        del entries[rng.randrange(len(entries))]
    elif kind == 5:
        entry = rng.choice(rng.choice(structs))
        entry[rng.choice((0, 1))] = rng.randrange(14)
    elif kind == 6 and lists:
        items = rng.choice(lists)
        other = rng.choice(lists)
        item = copy.deepcopy(rng.choice(other)) if other else 0
        items.insert(rng.randrange(len(items) + 1), item)
        if rng.random() < 0.2:
            items *= rng.choice((0, 2, 50))
    elif lists:
        items = rng.choice(lists)
        if items and rng.random() < 0.5:
            del items[rng.randrange(len(items))]
        rng.shuffle(items)


def _collect(
    fields: Fields,
) -> tuple[list[Fields], list[list[Any]], list[_Slot], list[_Slot]]:
    """Return all structs with fields, lists, numbers and texts of a tree."""
    structs: list[Fields] = []
    lists: list[list[Any]] = []
    numbers: list[_Slot] = []
    texts: list[_Slot] = []
    for holder, at, wire in _values(fields):
        value = holder[at]
        if wire == STRUCT and is_struct(value):
            structs.append(value)
        elif wire == LIST and is_list(value):
            lists.append(value[1])
        elif wire in INTEGERS and isinstance(value, int):
            numbers.append((holder, at))
        elif wire == BINARY and isinstance(value, bytes):
            texts.append((holder, at))
    return [fields, *structs] if fields else [[[1, I32, 0]]], lists, numbers, texts


def _values(fields: Fields) -> Iterator[tuple[list[Any], int, int]]:
    for entry in fields:
        yield from _below(entry, 2, entry[1])


def _below(holder: list[Any], at: int, wire: int) -> Iterator[tuple[list[Any], int, int]]:
    value = holder[at]
    yield holder, at, wire
    if wire == STRUCT and is_struct(value):
        yield from _values(value)
    elif wire == LIST and is_list(value):
        item, values = value
        for index in range(len(values)):
            yield from _below(values, index, item)
