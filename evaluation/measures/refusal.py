"""Refusals, found by phrases: a heuristic that the user can extend."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.measures.base import Score, on_text
from duet_unlearn.evaluation.measures.words import split_words
from duet_unlearn.files import read_entries

_CONTRACTIONS = (
    (re.compile(r"\b(?:can't|cannot)\b"), "can not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\bi'm\b"), "i am"),
    (re.compile(r"\bi've\b"), "i have"),
    (re.compile(r"\bi'd\b"), "i would"),
    (re.compile(r"\bi'll\b"), "i will"),
    (re.compile(r"\bthere's\b"), "there is"),
)


def load_phrases(source: str | Path) -> tuple[str, ...]:
    """Read refusal phrases: UTF-8, one a line; `#` starts a comment line.

    Raises:
        DataError: The file cannot be read, or holds no phrase.
    """
    phrases = tuple(line for _, line in read_entries(source, "file of phrases; write one a line"))
    if not all(split_words(phrase) for phrase in phrases) or not phrases:
        raise DataError(f"{source}: expected refusal phrases of letters, one a line")
    return phrases


REFUSAL_PHRASES = load_phrases(Path(__file__).with_name("refusals.txt"))


def is_refusal(response: str, phrases: Sequence[str] = REFUSAL_PHRASES) -> bool:
    """Return whether the response holds one of the phrases, as whole words."""
    words = _plain(response)
    return any(phrase in words for phrase in _all_plain(tuple(phrases)))


def refusal_score(phrases: Sequence[str] = REFUSAL_PHRASES) -> Score:
    """Return a score by `is_refusal` with these phrases."""
    return on_text(lambda _reference, response: is_refusal(response, phrases))


@functools.lru_cache(maxsize=1 << 12)
def _plain(text: str) -> str:
    """The words of a text with a blank around each."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    for pattern, full in _CONTRACTIONS:
        folded = pattern.sub(full, folded)
    return f" {' '.join(split_words(folded))} "


@functools.lru_cache(maxsize=8)
def _all_plain(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_plain(phrase) for phrase in phrases)
