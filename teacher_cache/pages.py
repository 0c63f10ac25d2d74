"""Bound what a Parquet column decodes to, before it is decoded.

A footer may claim five values over a page that decodes to billions: run-length encoding packs them
into a few bytes, and Parquet libraries believe the page. So the headers of the pages themselves are
read here, which costs a few microseconds each, and only what keeps to the format's limits reaches
the decoder. The headers are Thrift structs in the compact protocol.
"""

from dataclasses import dataclass
from typing import BinaryIO

_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
# Where each kind of page keeps its own header, and in it the encoding.
_OWN_HEADER = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}
_ENCODING_FIELD = {_DATA_PAGE: 2, _DICTIONARY_PAGE: 2, _DATA_PAGE_V2: 4}
# Prefixes of earlier values: a few bytes can stand for any number of long strings.
_DELTA_BYTE_ARRAY = 7
_MAX_HEADER_BYTES = 1 << 16
_MAX_PAGES = 1 << 14

_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LIST, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 9, 12

Struct = dict[int, "int | Struct"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnLimits:
    """What one column of a row group may decode to."""

    values: int
    """Most values, those of all lists together."""
    bytes: int
    """Most uncompressed bytes in its pages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnPlace:
    """Where the footer says that a column's pages lie, and what it claims of them."""

    start: int
    length: int
    values: int


def check_pages(file: BinaryIO, place: ColumnPlace, limits: ColumnLimits) -> None:
    """Check every page header of a column.

    Raises:
        ValueError: The pages hold more than the limits allow or not what the footer says, or a
            header is malformed.
        OSError: The file cannot be read.
    """
    if not 0 <= place.values <= limits.values:
        raise ValueError(f"{place.values} values in a column, expected at most {limits.values}")
    stop = place.start + place.length
    cursor, values, size = place.start, 0, 0
    for _ in range(_MAX_PAGES):
        if values >= place.values:
            break
        file.seek(cursor)
        header, header_bytes = read_struct(file.read(max(0, min(_MAX_HEADER_BYTES, stop - cursor))))
        kind, uncompressed, compressed = (_count(header, field) for field in (1, 2, 3))
        own = header.get(_OWN_HEADER.get(kind, -1))
        if not isinstance(own, dict):
            raise ValueError(f"a page of unknown kind {kind}")
        if _count(own, _ENCODING_FIELD[kind]) == _DELTA_BYTE_ARRAY:
            raise ValueError("a page in the encoding DELTA_BYTE_ARRAY, which the format excludes")
        if kind != _DICTIONARY_PAGE:
            values += _count(own, 1)
        size += uncompressed
        cursor += header_bytes + compressed
        if size > limits.bytes or values > place.values or cursor > stop:
            raise ValueError(
                f"pages of {values} values and {size} bytes where the footer says {place.values} "
                f"values and the format allows {limits.bytes} bytes"
            )
    if values != place.values:
        raise ValueError(f"pages of {values} values where the footer says {place.values}")


def read_struct(data: bytes) -> tuple[Struct, int]:
    """Read a Thrift struct; return its integers and structs by field id, and its length in bytes.

    Raises:
        ValueError: It does not end within `data`, or is malformed.
    """
    cursor = _Cursor(data)
    try:
        return cursor.struct(depth=0), cursor.at
    except IndexError:
        raise ValueError("a page header that does not end") from None


class _Cursor:
    """Reads the compact protocol from the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int) -> Struct:
        if depth > 4:
            raise ValueError("a page header nested too deep")
        fields: Struct = {}
        last = 0
        while head := self._byte():
            kind, delta = head & 15, head >> 4
            last = last + delta if delta else self._integer()
            if last in fields:
                raise ValueError("a page header that says a thing twice")
            if kind == _STRUCT:
                fields[last] = self.struct(depth + 1)
            elif kind in _INTEGERS:
                fields[last] = self._integer()
            else:
                self._skip(kind, depth)
        return fields

    def _skip(self, kind: int, depth: int) -> None:
        """Pass over a value that says nothing about sizes."""
        if kind in _BOOLEANS:
            return
        if kind in (_BYTE, _DOUBLE):
            self._forward(1 if kind == _BYTE else 8)
        elif kind == _BINARY:
            self._forward(self._unsigned())
        elif kind == _LIST and depth < 4:
            self._skip_list(depth)
        else:
            raise ValueError(f"a page header with a field of type {kind}")

    def _skip_list(self, depth: int) -> None:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._unsigned()
        if count > len(self._data):
            raise ValueError("a page header that does not end")
        for _ in range(count):
            if head & 15 in _BOOLEANS:  # in a list, unlike in a field, a boolean takes a byte
                self._byte()
            elif head & 15 in _INTEGERS:
                self._integer()
            elif head & 15 == _STRUCT:
                self.struct(depth + 1)
            else:
                self._skip(head & 15, depth + 1)

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _forward(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a page header with a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)


def _count(fields: Struct, number: int) -> int:
    value = fields.get(number)
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"a page header with {value} in field {number}")
    return value
