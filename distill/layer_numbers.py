"""Layers by number, as a user writes them: `5-7`, `0,3,5-7`."""

import re

from duet_unlearn.errors import ConfigurationError

_PART = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the numbers, sorted, each once.

    Raises:
        ConfigurationError: The text is no list of numbers and ranges.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else -1
        if last < first:
            raise ConfigurationError(
                f"layers is {text!r}, expected numbers and ranges such as 0,3,5-7"
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))
