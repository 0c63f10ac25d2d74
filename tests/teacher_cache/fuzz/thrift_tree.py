"""Any struct of Thrift's compact protocol as nested lists, to change it anywhere and write it back.

A struct is a list of fields `[id, wire type, value]`, a list `[wire type of its items, values]`.
"""

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS = (I16, I32, I64)

Fields = list[list[Any]]


def parse(data: bytes) -> Fields:
    """Return the struct at the front of sound bytes."""
    return _Parser(data).value(STRUCT, in_list=True)


class _Parser:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def value(self, wire: int, *, in_list: bool = False) -> Any:
        if wire in (TRUE, FALSE):
            return bool(self._take(1)[0] == TRUE) if in_list else wire == TRUE
        if wire == BYTE:
            return self._take(1)[0]
        if wire in INTEGERS:
            number = self._unsigned()
            return (number >> 1) ^ -(number & 1)
        if wire == DOUBLE:
            return self._take(8)
        if wire == BINARY:
            return self._take(self._unsigned())
        if wire == LIST:
            head = self._take(1)[0]
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [head & 15, [self.value(head & 15, in_list=True) for _ in range(count)]]
        assert wire == STRUCT
        fields: Fields = []
        last = 0
        while head := self._take(1)[0]:
            last = last + (head >> 4) if head >> 4 else self.value(I16)
            fields.append([last, head & 15, self.value(head & 15)])
        return fields

    def _take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._take(1)[0]) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift


def is_list(value: Any) -> bool:
    """Say whether a value is a list, as `parse` gives it."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], int)


def is_struct(value: Any) -> bool:
    """Say whether a value is a struct with fields."""
    return isinstance(value, list) and bool(value) and not is_list(value)


def pack(fields: Fields) -> bytes:
    """Return a struct as bytes; wire types need not fit the values."""
    return _value(STRUCT, fields)


def _value(wire: int, value: Any, *, in_list: bool = False) -> bytes:
    if isinstance(value, bool) and wire in (TRUE, FALSE):
        return bytes([TRUE if value else FALSE]) if in_list else b""
    if isinstance(value, int):
        return bytes([value & 255]) if wire == BYTE else varint((value << 1) ^ (value >> 70))
    if isinstance(value, bytes):
        return value if wire == DOUBLE else varint(len(value)) + value
    if is_list(value):  # wherever a change has put it
        item, values = value
        head = bytes([min(len(values), 15) << 4 | item])
        length = varint(len(values)) if len(values) >= 15 else b""
        return head + length + b"".join(_value(item, v, in_list=True) for v in values)
    data, last = b"", 0
    for number, kind, child in value:
        kind = (TRUE if child else FALSE) if isinstance(child, bool) else kind
        if 0 < number - last < 16:
            data += bytes([(number - last) << 4 | kind])
        else:
            data += bytes([kind]) + varint((number << 1) ^ (number >> 70))
        data += _value(kind, child)
        last = number
    return data + b"\0"


def varint(number: int, pad: int = 0) -> bytes:
    """Return an unsigned number in seven bits a byte, in at least `pad` bytes."""
    number &= (1 << 72) - 1
    out = bytearray()
    while number > 127 or len(out) + 1 < pad:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
