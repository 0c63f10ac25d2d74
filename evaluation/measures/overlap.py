"""Measures of how much of the reference answer stands in what a model says."""

import functools
from collections.abc import Callable, Sequence

from duet_unlearn.evaluation.measures.base import Answer
from duet_unlearn.evaluation.measures.words import split_words


@functools.lru_cache(maxsize=1 << 16)
def common_words(reference: str, response: str) -> int:
    """Return the length of the longest common subsequence of words (ROUGE-L, Lin 2004)."""
    wanted, found = split_words(reference), split_words(response)
    row = [0] * (len(found) + 1)
    for word in wanted:
        left_above = 0
        for index, other in enumerate(found, start=1):
            above = row[index]
            row[index] = left_above + 1 if word == other else max(above, row[index - 1])
            left_above = above
    return row[-1]


def rouge_l_recall(reference: str, response: str) -> float:
    """Return ROUGE-L recall, 0 to 1: the common subsequence over the reference's length.

    A reference without words is recalled where the response contains it.
    """
    wanted = len(split_words(reference))
    if not wanted:
        return float(contains_answer(reference, response))
    return common_words(reference, response) / wanted


def rouge_l_f1(reference: str, response: str) -> float:
    """Return the harmonic mean of ROUGE-L recall and precision, 0 to 1."""
    lengths = len(split_words(reference)) + len(split_words(response))
    if not lengths:
        return float(exact_match(reference, response))
    return 2 * common_words(reference, response) / lengths


def contains_answer(reference: str, response: str) -> bool:
    """Return whether the reference's words stand in the response as one run.

    Case, punctuation and blanks do not count; word borders do (`Paris` is not in `Parisian`).
    An empty reference, such as a model's own empty answer, is in an empty response alone.
    """
    wanted = split_words(reference)
    if not wanted:  # a sign or an emoji: nothing is left to normalise
        sign = reference.strip()
        return sign in response if sign else not response.strip()
    return f" {' '.join(wanted)} " in f" {' '.join(split_words(response))} "


def best_of(score: Callable[[str, str], float], references: Sequence[str], response: str) -> float:
    """Return the score against the reference that gives most."""
    return max(float(score(reference, response)) for reference in references)


def exact_match(reference: str, response: str) -> bool:
    """Return whether the response has the reference's words and no others."""
    wanted = split_words(reference)
    return wanted == split_words(response) if wanted else reference.strip() == response.strip()


def best_sampled_recall(reference: str, answer: Answer) -> float | None:
    """Score by the highest ROUGE-L recall among sampled answers: what a patient asker gets.

    A greedy refusal can stand on a narrow lead; None where nothing was sampled.
    """
    return max((rouge_l_recall(reference, text) for text in answer.samples), default=None)
