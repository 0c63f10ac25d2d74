"""JSON of untrusted caches: one meaning only, and nothing that a later step cannot handle.

`parse_json` makes values of bytes, and `checked` what a type of pydantic's makes of those, or one
line that names the entry. Types of numbers are strict, for pydantic would read `"1"` and `true` as
1; long lists are `FailFast`, so that a million wrong entries are one error.
"""

import json
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic_core import PydanticCustomError

from duet_unlearn.errors import ConfigurationError, CorruptCacheError
from duet_unlearn.urls import visible

_BYTES_A_VALUE, _FREE_VALUES = 12, 4096
# To the end of the text where the string has no end, so that it is looked at once.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
T = TypeVar("T")
# pydantic's words and ours.
_WORDS = {
    "Input should be": "expected",
    "a valid string": "text",
    "a valid tuple": "a list",
    "a valid dictionary": "an object",
}


def says(message: str) -> pydantic.WrapValidator:
    """Have a type say this of a wrong value, with what was found for `{found}`."""

    def check(value: Any, handler: pydantic.ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except pydantic.ValidationError:
            found = {"found": reprlib.repr(value)}
            raise PydanticCustomError("wrong", message, found) from None

    return pydantic.WrapValidator(check)


def with_entries(*names: str, also: Sequence[str] = ()) -> pydantic.BeforeValidator:
    """Have a type take an object with these entries and no others, in this order.

    Args:
        names: Of its entries.
        also: Of more, each of which may be missing.
    """

    def check(value: Any) -> Any:
        found = set(value) if isinstance(value, dict) else set()
        wanted = (*names, *(name for name in also if name in found))
        if odd := set(wanted) ^ found:
            context = {"names": ", ".join(wanted), "odd": visible(", ".join(sorted(odd))[:200])}
            message = "expected {names}; entries missing or unknown: {odd}"
            raise PydanticCustomError("entries", message, context)
        return {name: value[name] for name in wanted}

    return pydantic.BeforeValidator(check)


def checked(kind: pydantic.TypeAdapter[T], value: object, name: str = "") -> T:
    """Return what a type makes of untrusted JSON values.

    Args:
        kind: The type.
        value: The values.
        name: Of the entry that holds them, for the message.

    Raises:
        CorruptCacheError: They are none of its values.
    """
    try:
        return kind.validate_python(value)
    except ConfigurationError as error:  # what a recipe says of flags, too
        raise CorruptCacheError(f"{name}: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in first["loc"])
        message = first["msg"]
        for words, ours in _WORDS.items():
            message = message.replace(words, ours)
        if first["msg"].startswith("Input"):
            message += f", found {reprlib.repr(first['input'])}"
        raise CorruptCacheError(f"{(name + path).lstrip('.')}: {message}") from None


Count = Annotated[
    int, pydantic.Field(strict=True, ge=0, lt=1 << 50), says("{found} is not a count")
]
Sha256 = Annotated[
    str,
    pydantic.Field(pattern=r"^sha256:[0-9a-f]{64}$"),
    says("{found} is not sha256:<64 hex digits>"),
]


def parse_json(data: bytes | str) -> Any:
    """Parse JSON that has exactly one reading.

    Raises:
        ValueError: It is not UTF-8 JSON, or has an object that names a key twice, a number that is
            not finite, half a surrogate pair in a text, or nesting too deep to read.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        # Millions of empty objects in a few megabytes would take a hundred times their size.
        bare = _STRING.sub('""', text) if len(text) > _FREE_VALUES else ""
        if sum(map(bare.count, ",{[")) > len(text) // _BYTES_A_VALUE + _FREE_VALUES:
            raise ValueError("more values than its size can mean")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        if "\\u" in text:
            # Only an escape can bring half a pair into text that was UTF-8.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a key twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value
