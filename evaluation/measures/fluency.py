"""Measures of whether a model still speaks: they need no reference answer."""

from duet_unlearn.evaluation.measures.base import Answer
from duet_unlearn.evaluation.measures.words import split_words


def distinct_score(_reference: str, answer: Answer) -> float | None:
    """Score by distinct-2: different pairs of neighbouring words over all of them (Li 2016)."""
    return _distinct(answer.text, 2)


def repetition_score(_reference: str, answer: Answer) -> float | None:
    """Score by the share of runs of four words that stood in the answer before (Welleck 2020)."""
    distinct = _distinct(answer.text, 4)
    return None if distinct is None else 1.0 - distinct


def _distinct(text: str, length: int) -> float | None:
    words = split_words(text)
    runs = [words[i : i + length] for i in range(len(words) - length + 1)]
    return len(set(runs)) / len(runs) if runs else None
