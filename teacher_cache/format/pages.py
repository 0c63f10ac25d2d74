"""Bound what a Parquet column decodes to, before it is decoded.

A footer may claim five values over a page that decodes to billions: run-length encoding packs them
into a few bytes, and Parquet libraries believe the page. So the headers of the pages themselves are
read here, which costs a few microseconds each, and only what keeps to the format's limits reaches
the decoder. The headers are Thrift structs in the compact protocol.
"""

from dataclasses import dataclass
from typing import BinaryIO

from duet_unlearn.teacher_cache.format.footer import ColumnChunk
from duet_unlearn.teacher_cache.format.thrift import Scalar, Struct, StructOf, read_struct

_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
# Where each kind of page keeps its own header, and in it the encoding.
_OWN_HEADER = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}
_ENCODING_FIELD = {_DATA_PAGE: 2, _DICTIONARY_PAGE: 2, _DATA_PAGE_V2: 4}
# Prefixes of earlier values: a few bytes can stand for any number of long strings.
_DELTA_BYTE_ARRAY = 7
_MAX_HEADER_BYTES = 1 << 16
_MAX_PAGES = 1 << 14

_HEADER = StructOf(
    {
        **dict.fromkeys((1, 2, 3), Scalar.INTEGER),
        **{
            field: StructOf({1: Scalar.INTEGER, _ENCODING_FIELD[kind]: Scalar.INTEGER})
            for kind, field in _OWN_HEADER.items()
        },
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnLimits:
    """What one column of a row group may decode to."""

    values: int
    """Most values, those of all lists together."""
    bytes: int
    """Most uncompressed bytes in its pages."""


def check_pages(file: BinaryIO, place: ColumnChunk, limits: ColumnLimits) -> None:
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
        data = file.read(max(0, min(_MAX_HEADER_BYTES, stop - cursor)))
        header, header_bytes = read_struct(data, _HEADER)
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


def _count(fields: Struct, number: int) -> int:
    value = fields.get(number)
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"a page header with {value} in field {number}")
    return value
