"""Scores of one response against one reference answer, and their means in points (0-100).

ROUGE-L comes from `rouge-score`, the package that unlearning papers use, with a tokenizer that
knows more than `a-z0-9`: the package's own drops every other letter, so that a Russian or Chinese
answer always scores zero. On ASCII text both give the same tokens.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POINTS = 100.0

_ASCII_WORD = re.compile(r"[a-z0-9]+")

# Scripts that put no space between words; there a letter with its marks is the token, which is
# what character-level ROUGE for Chinese does.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)

REFUSAL_PHRASES = (
    "i do not know",
    "i do not have",
    "i do not recall",
    "i do not remember",
    "i can not",
    "i could not",
    "i will not",
    "i have no",
    "i have never heard",
    "i have not heard",
    "i have forgotten",
    "i am not able",
    "i am not allowed",
    "i am not aware",
    "i am not familiar",
    "i am not sure",
    "i am unable",
    "i am sorry",
    "i apologise",
    "i apologize",
    "i must decline",
    "i decline",
    "i would rather not",
    "as an ai",
    "there is no information",
    "no information available",
    "can not help with",
    "can not assist",
    "can not answer",
    "unable to answer",
    "sorry but",
)
"""What marks a response as a refusal, contractions written out. English only: a heuristic."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseScores:
    """Scores of one response."""

    rouge_l_recall: float
    """Longest common subsequence over the answer's length, 0 to 1."""
    rouge_l_f1: float
    """Harmonic mean of that and of the same over the response's length, 0 to 1."""
    contains_answer: bool
    """Whether the whole answer stands in the response."""
    refusal: bool
    """Whether the response holds a refusal phrase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanScores:
    """Means over queries, in points (0 to 100)."""

    queries: int
    rouge_l_recall: float
    rouge_l_f1: float
    contains_answer: float
    refusals: float


def split_words(text: str) -> list[str]:
    """Return the words of a text in any script, without case, width, punctuation or blanks.

    On ASCII text these are the tokens of `rouge-score`'s own tokenizer. In scripts without spaces
    between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every letter is a word.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if folded.isascii():
        return _ASCII_WORD.findall(folded)
    words: list[str] = []
    in_word = in_spaced_word = False
    for character in folded:
        category = unicodedata.category(character)
        if category == "Cf":  # joiners and soft hyphens stand inside words and are no letters
            continue
        if character.isalnum():
            spaced = _UNSPACED.match(character) is None
            if spaced and in_spaced_word:
                words[-1] += character
            else:
                words.append(character)
            in_word, in_spaced_word = True, spaced
        elif category[0] == "M" and in_word:
            words[-1] += character
        else:
            in_word = in_spaced_word = False
    return words


def contains_answer(answer: str, response: str) -> bool:
    """Return whether the answer's words stand in the response as one run.

    Case, punctuation and blanks do not count; word borders do (`Paris` is not in `Parisian`).
    """
    wanted = split_words(answer)
    if not wanted:  # a sign or an emoji: nothing is left to normalise
        return answer.strip() in response
    return f" {' '.join(wanted)} " in f" {' '.join(split_words(response))} "


def is_refusal(response: str) -> bool:
    """Return whether the response holds one of `REFUSAL_PHRASES`."""
    text = unicodedata.normalize("NFKC", response).casefold().replace("\u2019", "'")
    for pattern, full in _CONTRACTIONS:
        text = pattern.sub(full, text)
    words = f" {' '.join(split_words(text))} "
    return any(f" {phrase} " in words for phrase in REFUSAL_PHRASES)


@functools.lru_cache(maxsize=1 << 16)
def score_response(answer: str, response: str) -> ResponseScores:
    """Score one response against its reference answer; the same pair is scored once."""
    rouge = _rouge_scorer().score(answer, response)["rougeL"]
    return ResponseScores(
        rouge_l_recall=float(rouge.recall),
        rouge_l_f1=float(rouge.fmeasure),
        contains_answer=contains_answer(answer, response),
        refusal=is_refusal(response),
    )


def mean_scores(scores: Sequence[ResponseScores]) -> MeanScores:
    """Return the means in points.

    Raises:
        ValueError: there is no score to average.
    """
    if not scores:
        raise ValueError("no scores to average")
    return MeanScores(
        queries=len(scores),
        rouge_l_recall=_points([s.rouge_l_recall for s in scores]),
        rouge_l_f1=_points([s.rouge_l_f1 for s in scores]),
        contains_answer=_points([s.contains_answer for s in scores]),
        refusals=_points([s.refusal for s in scores]),
    )


def performance_shift(
    reference: Mapping[str, float], model: Mapping[str, float], splits: Mapping[str, str]
) -> float:
    """Return DUET's Performance Shift (arXiv 2601.21283) over the sets given, in points.

    The sum of the drops on forget sets and of the changes on all others: forgetting counts for a
    model, and so does what it keeps, with one point for one point.

    Args:
        reference: mean score in points of the model to compare with, by set name.
        model: the same of the model in question.
        splits: `forget`, `retain` or `general`, by set name.
    """
    shift = 0.0
    for name, split in splits.items():
        change = model[name] - reference[name]
        shift += -change if split == "forget" else change
    return shift


def _points(values: Sequence[float]) -> float:
    return POINTS * sum(values) / len(values)


class _WordTokenizer:
    """What `RougeScorer` takes as its tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


@functools.cache
def _rouge_scorer() -> Any:
    # Half a second of imports (nltk) that a module which only plots or reports does not pay.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
