"""Thrift's compact protocol, as far as Parquet's footers and page headers need it.

Reading takes a description of the fields that matter and passes over all others, so what comes of
some bytes is small whatever they claim: nothing is made for fields that nobody asked for, lists
have a largest length, and depth is bounded. Numbers take at most 64 bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (
    *range(1, 11),
    12,
)
_INTEGERS = (_I16, _I32, _I64)
_MAX_DEPTH = 12
_MAX_BITS = 64


class Scalar(Enum):
    """Values that are no structs or lists; an integer may have any width."""

    INTEGER = "an integer"
    BOOLEAN = "a boolean"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class StructOf:
    """A struct, by the fields that are wanted of it."""

    fields: "Mapping[int, Kind]"


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of at most `most` items of one kind."""

    item: "Kind"
    most: int


Kind = Scalar | StructOf | ListOf

_NOTHING: "Mapping[int, Kind]" = {}

Struct = dict[int, Any]
"""Values by field id: int, bool, bytes, list or again a struct, as the description says."""


def read_struct(data: bytes, kind: StructOf) -> tuple[Struct, int]:
    """Read the struct at the front of some bytes.

    Args:
        data: The bytes; more may follow the struct.
        kind: What is wanted of it.

    Returns:
        The wanted fields that are there, and the struct's length in bytes.

    Raises:
        ValueError: It does not end within `data`, is malformed, or a field is of another kind.
    """
    cursor = _Cursor(data)
    try:
        return cursor.struct(kind, depth=0), cursor.at
    except IndexError:
        raise ValueError("a Thrift struct that does not end") from None


class _Cursor:
    """Reads from the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, kind: StructOf | None, depth: int) -> Struct:
        """Read a struct, or pass over one where no kind is given."""
        if depth > _MAX_DEPTH:
            raise ValueError("a Thrift struct nested too deep")
        wanted = kind.fields if kind is not None else _NOTHING
        fields: Struct = {}
        last = 0
        while head := self._byte():
            delta, wire = head >> 4, head & 15
            last = last + delta if delta else self._integer()
            if last not in wanted:
                self._skip(wire, depth)
                continue
            if last in fields:
                raise ValueError(f"a Thrift struct that says field {last} twice")
            if wire in _INTEGERS and wanted[last] is Scalar.INTEGER:  # nearly all of them
                fields[last] = self._integer()
            else:
                fields[last] = self._field(wanted[last], wire, depth)
        return fields

    def _field(self, kind: Kind, wire: int, depth: int) -> Any:
        # A boolean field is its own wire type; in a list, it takes a byte.
        if wire in (_TRUE, _FALSE) and kind is Scalar.BOOLEAN:
            return wire == _TRUE
        return self._value(kind, wire, depth)

    def _value(self, kind: Kind, wire: int, depth: int) -> Any:
        if kind is Scalar.INTEGER and wire in _INTEGERS:
            return self._integer()
        if kind is Scalar.INTEGER and wire == _BYTE:
            return self._byte()
        if kind is Scalar.BYTES and wire == _BINARY:
            start = self._forward(self._unsigned())
            return self._data[start : self.at]
        if isinstance(kind, StructOf) and wire == _STRUCT:
            return self.struct(kind, depth + 1)
        if isinstance(kind, ListOf) and wire == _LIST:
            item, count = self._list_head()
            if count > kind.most:
                raise ValueError(f"a Thrift list of {count} items, expected at most {kind.most}")
            return [self._value(kind.item, item, depth + 1) for _ in range(count)]
        raise ValueError(f"a Thrift field of wire type {wire}, expected {_name(kind)}")

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        return head & 15, head >> 4 if head >> 4 < 15 else self._unsigned()

    def _skip(self, wire: int, depth: int) -> None:
        if wire in _INTEGERS:
            self._unsigned()
        elif wire in (_TRUE, _FALSE):
            return
        elif wire == _BINARY:
            self._forward(self._unsigned())
        elif wire == _STRUCT:
            self.struct(None, depth + 1)
        elif wire in (_BYTE, _DOUBLE):
            self._forward(1 if wire == _BYTE else 8)
        elif wire in (_LIST, _SET) and depth < _MAX_DEPTH:
            item, count = self._list_head()
            if count > len(self._data):  # every item takes a byte or more
                raise IndexError
            for _ in range(count):
                self._skip(_BYTE if item in (_TRUE, _FALSE) else item, depth + 1)
        else:
            raise ValueError(f"a Thrift field of wire type {wire}")

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _forward(self, count: int) -> int:
        """Pass over some bytes; return where they begin."""
        start = self.at
        if count > len(self._data) - start:
            raise IndexError
        self.at = start + count
        return start

    def _unsigned(self) -> int:
        byte = self._data[self.at]
        if byte < 128:
            self.at += 1
            return byte
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> _MAX_BITS:
                    break
                return value
            shift += 7
            if shift >= _MAX_BITS:
                break
        raise ValueError("a Thrift number of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)


def _name(kind: Kind) -> str:
    if isinstance(kind, Scalar):
        return kind.value
    return "a struct" if isinstance(kind, StructOf) else "a list"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as it is written: its wire type and its bytes."""

    wire: int
    data: bytes


def i32(value: int) -> Encoded:
    """Encode an integer that the reader takes as 32 bits wide; enums are such integers."""
    return Encoded(_I32, _varint(_zigzag(value)))


def i64(value: int) -> Encoded:
    """Encode an integer that the reader takes as 64 bits wide."""
    return Encoded(_I64, _varint(_zigzag(value)))


def text(value: bytes) -> Encoded:
    """Encode bytes or UTF-8 text."""
    return Encoded(_BINARY, _varint(len(value)) + value)


def struct(fields: Mapping[int, Encoded]) -> Encoded:
    """Encode a struct; ids are positive and at most 15 apart."""
    data, last = bytearray(), 0
    for number, value in sorted(fields.items()):
        data.append((number - last) << 4 | value.wire)
        data += value.data
        last = number
    return Encoded(_STRUCT, bytes(data) + b"\0")


def list_of(items: Sequence[Encoded]) -> Encoded:
    """Encode a list of at least one item, all of one wire type."""
    head = bytes([min(len(items), 15) << 4 | items[0].wire])
    length = _varint(len(items)) if len(items) >= 15 else b""
    return Encoded(_LIST, head + length + b"".join(item.data for item in items))


def _zigzag(value: int) -> int:
    return (value << 1) ^ (value >> 63)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
