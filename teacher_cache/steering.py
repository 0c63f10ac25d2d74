"""How well a prefix steers a teacher: what comes back of the base's own answers behind it.

No reference answers are needed. On forget queries little of what the base says should come back
behind the prefix, on retain queries most of it. The measure is ROUGE-L recall against the base's
answer, the paper's own measure with the base in the place of the truth.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.queries import Query
from duet_unlearn.evaluation.measures.overlap import rouge_l_recall
from duet_unlearn.evaluation.measures.refusal import is_refusal
from duet_unlearn.evaluation.measures.words import split_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from duet_unlearn.teacher_cache.engines.base import Engine

POINTS = 100.0
FIFTH = 20.0
"""Points that may come back on forget queries, or be lost on retain queries, before it is said."""
ANSWER_TOKENS = 24
"""Longest answer that is compared: enough to name what is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steering:
    """What a prefix does to the answers of one split, in points (0 to 100)."""

    queries: int
    """Scored queries; those to which the base itself says nothing tell nothing."""
    recall: float
    """Mean ROUGE-L recall of the base's own answer behind the prefix; the base itself has 100."""
    refused: float
    """Answers with a refusal phrase."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, in tenths of a point."""
        return {
            "queries": self.queries,
            "recall": round(self.recall, 1),
            "refused": round(self.refused, 1),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One query, what the base says, and what it says behind the prefix."""

    query: str
    base: str
    prefixed: str

    @property
    def recall(self) -> float:
        """ROUGE-L recall of the base's answer, 0 to 1."""
        return rouge_l_recall(self.base, self.prefixed)

    @property
    def telling(self) -> bool:
        """Whether the base says something that could come back."""
        return bool(split_words(self.base))


def score_forget(comparisons: Sequence[Comparison]) -> Steering:
    """Score forget queries; one that the base refuses by itself has nothing to forget."""
    return _score([c for c in comparisons if not is_refusal(c.base)])


def score_retain(comparisons: Sequence[Comparison]) -> Steering:
    """Score retain queries."""
    return _score(comparisons)


def _score(comparisons: Iterable[Comparison]) -> Steering:
    telling = [c for c in comparisons if c.telling]
    share = POINTS / max(1, len(telling))
    return Steering(
        queries=len(telling),
        recall=share * sum(c.recall for c in telling),
        refused=share * sum(is_refusal(c.prefixed) for c in telling),
    )


def draw(queries: Sequence[Query], count: int, *, seed: int) -> list[Query]:
    """Return a seeded sample of a split's queries, in its order.

    Whether a query is drawn depends on its own text and not on the order of a file.
    """

    def rank(query: Query) -> bytes:
        return hashlib.sha256(f"{seed}\0{query.text}".encode("utf-8", "surrogatepass")).digest()

    return sorted(queries, key=rank)[:count]


def answers(
    engine: "Engine",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = ANSWER_TOKENS,
) -> Iterator[tuple[int, str]]:
    """Yield the index of each prompt with the greedy answer as text, in any order."""
    for index, ids in engine.responses(enumerate(prompts), max_new_tokens):
        yield index, str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
