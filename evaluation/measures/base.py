"""What a measure sees and what it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """How a model takes a text that it is made to say behind a prompt."""

    log_probabilities: tuple[float, ...]
    """Of each token of the text in nats, given the prompt and the tokens before it."""
    greedy: tuple[bool, ...]
    """Whether each of these tokens is the one that greedy decoding would take there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model makes of one query: more than its text."""

    text: str
    token_ids: tuple[int, ...] = ()
    reference: Likelihood | None = None
    """Of the reference answer; None where no measure asked for it."""
    wrong: tuple[Likelihood, ...] = ()
    """Of the wrong answers that the query file names."""
    samples: tuple[str, ...] = ()
    """Further answers, drawn at temperature 1; empty where no measure asked for them."""


Score = Callable[[str, Answer], float | None]
"""From reference answer and answer to 0 to 1, or None where the measure says nothing of it."""


def on_text(compare: Callable[[str, str], float]) -> Score:
    """Return a score that compares the reference answer with the answer's text."""
    return lambda reference, answer: float(compare(reference, answer.text))


@dataclass(frozen=True, slots=True)
class Measure:
    """One way to score an answer."""

    name: str
    """As the command line and the JSON document have it."""
    score: Score = field(repr=False)
    description: str
    needs: Literal["text", "likelihood", "samples"] = "text"
    """What it looks at beside the greedy answer's text; each is a pass over the model of its own,
    made where a measure on it is named."""
    uncut: Score | None = field(default=None, repr=False)
    """What two models' distributions are compared on, where `score` cuts it off."""

    def best(self, references: Sequence[str], answer: Answer) -> float | None:
        """Return the score against the reference that gives most; None where there is none."""
        scores = [self.score(reference, answer) for reference in references]
        return max((score for score in scores if score is not None), default=None)
