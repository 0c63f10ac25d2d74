"""How well a prefix steers a teacher: what comes back of the base's own answers behind it.

No reference answers are needed. On forget queries little of what the base says should come back
behind the prefix, on retain queries most of it. The measure is ROUGE-L recall against the base's
answer, the paper's own measure with the base in the place of the truth. Words of the query do not
count: a refusal that repeats the question gives nothing away.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duet_unlearn.data.queries import Query
from duet_unlearn.evaluation.measures.overlap import rouge_l_recall
from duet_unlearn.evaluation.measures.refusal import is_refusal
from duet_unlearn.evaluation.measures.words import split_words

Asked = tuple[Query, str, str]
"""A query, what the base says to it, and what it says behind the prefix."""

ANSWER_TOKENS = 24
"""Longest answer that is compared: enough to name what is asked for."""
POINTS = 100.0
FIFTH = 20.0
"""Points that may come back on forget queries, or be lost on retain queries, before it is said."""
STEP = 10.0
"""Points on forget queries that a sample of this size cannot tell apart."""
RULE = (
    "fewest points that come back on forget queries, in steps of 10; then those that may stand in "
    "front of retain queries too; then least probability left to the base's own first token, which "
    "is what training sees; then fewest points; then most points kept on retain queries; last come "
    "those that a third of the sample shows to be worse than six others"
)
"""How candidates are ordered."""
STRENGTH = 1.0
"""By how much the proposed cache moves forget rows away from the base; see `build --strength`."""
VIEWS = ("@view-shapes",)
"""Shapes to cache with any prefix: a student that never met them refuses in chats alone."""
POSITIONS = 12
"""Decoding steps to cache with any prefix: a kept answer as far as what was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steering:
    """What a prefix does to the answers of one split, in points (0 to 100)."""

    queries: int
    """Scored queries; those to which the base itself says nothing tell nothing."""
    recall: float
    """Mean recall of the base's own answer behind the prefix; the base itself has 100."""
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
class Candidate:
    """A prefix at a place, as it stands in front of queries."""

    name: str
    prefix: str
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """A candidate and what it does."""

    candidate: Candidate
    forget: Steering
    retain: Steering
    first_token: float | None = None
    """Mean probability, in points, that the first token of the base's own answer to a forget query
    still has; None where it was not measured."""
    said: tuple[str, ...] = ()
    """Its answers to `TuneResult.asked`."""

    @property
    def retain_prefix(self) -> bool:
        """Whether the prefix may stand in front of retain queries: it costs at most a fifth."""
        return self.retain.recall >= POINTS - FIFTH

    @property
    def steers(self) -> bool:
        """Whether the base forgets behind it: at most a fifth of its answers comes back."""
        return self.forget.queries > 0 and self.forget.recall <= FIFTH

    @property
    def rank(self) -> tuple[float, bool, float, float, float]:
        """What candidates are sorted by, the best first; see `RULE`."""
        step, forget = round(self.forget.recall / STEP), self.forget.recall
        # An answer is refused or not, but how surely decides how surely a student will refuse.
        first = POINTS if self.first_token is None else self.first_token
        # Where retain queries go without the prefix, what it does to them teaches nobody: last.
        return (step, not self.retain_prefix, first, forget, -self.retain.recall)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "name": self.candidate.name,
            "prefix": self.candidate.prefix,
            "place": self.candidate.place,
            "retain_prefix": self.retain_prefix,
            "strength": STRENGTH,
            "views": list(VIEWS),
            "positions": POSITIONS,
            "steers": self.steers,
            **{f"forget_{key}": value for key, value in self.forget.to_json().items()},
            "forget_first_token": None if self.first_token is None else round(self.first_token, 1),
            **{f"retain_{key}": value for key, value in self.retain.to_json().items()},
        }


def score(asked: Iterable[Asked]) -> Steering:
    """Score queries; those that tell nothing are left out."""
    telling = [entry for entry in asked if recall_of(entry) is not None]
    share = POINTS / max(1, len(telling))
    return Steering(
        queries=len(telling),
        recall=share * sum(recall_of(entry) or 0.0 for entry in telling),
        refused=share * sum(is_refusal(said) for *_, said in telling),
    )


def recall_of(asked: Asked) -> float | None:
    """Return how much of the base's own answer comes back behind the prefix, 0 to 1.

    None where the base says nothing beyond the words of the query, or refuses a forget query by
    itself: there is nothing to lose or to forget.
    """
    query, plain, said = asked
    told = _beyond(query.text, plain)
    if not told or (query.split == "forget" and is_refusal(plain)):
        return None
    return rouge_l_recall(told, _beyond(query.text, said))


NOTHING_TOLD = (
    "without a prefix the base refuses every forget query that was asked, or says nothing beyond "
    "its words: no prefix can be measured, and nothing forgotten; take queries that it answers"
)


def _beyond(query: str, answer: str) -> str:
    """Return the words of an answer that its query does not hold."""
    known = frozenset(split_words(query))
    return " ".join(word for word in split_words(answer) if word not in known)


def draw(queries: Sequence[Query], count: int, *, seed: int) -> list[Query]:
    """Return a seeded sample of a split's queries, in its order.

    Whether a query is drawn depends on its own text and not on the order of a file.
    """

    def rank(query: Query) -> bytes:
        return hashlib.sha256(f"{seed}\0{query.text}".encode("utf-8", "surrogatepass")).digest()

    return sorted(queries, key=rank)[:count]
