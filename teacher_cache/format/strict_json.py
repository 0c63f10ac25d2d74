"""JSON of untrusted caches: one meaning only, and nothing that a later step cannot handle."""

import json
import math
import re
from typing import Any

_BYTES_A_VALUE, _FREE_VALUES = 12, 4096
# To the end of the text where the string has no end, so that it is looked at once.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)


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
