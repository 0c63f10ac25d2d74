"""Measures: each is a function in a file of this folder and a line of the table below."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.measures import fluency, likelihood, overlap, refusal
from duet_unlearn.evaluation.measures.base import Answer, Likelihood, Measure, Score, on_text

__all__ = ["MEASURES", "Answer", "Likelihood", "Measure", "Score", "select_measures"]

_TABLE = (
    Measure(
        "rouge_l_recall", on_text(overlap.rouge_l_recall), "share of the answer's words, in order"
    ),
    Measure("rouge_l_f1", on_text(overlap.rouge_l_f1), "the same, less for every other word"),
    Measure("contains_answer", on_text(overlap.contains_answer), "the whole answer is said"),
    Measure("exact_match", on_text(overlap.exact_match), "the answer and nothing else is said"),
    Measure("refusal", refusal.refusal_score(), "a refusal phrase is said"),
    Measure("distinct", fluency.distinct_score, "different pairs of words, of all pairs"),
    Measure("repetition", fluency.repetition_score, "runs of four words said before"),
    Measure(
        "answer_probability",
        likelihood.probability_score,
        "probability of the answer, a token",
        needs="likelihood",
    ),
    Measure(
        "truth_ratio",
        likelihood.truth_score,
        "the answer preferred to wrong ones",
        needs="likelihood",
        uncut=likelihood.truth_ratio,
    ),
    Measure(
        "extraction_strength",
        likelihood.extraction_score,
        "share of the answer that follows by itself",
        needs="likelihood",
    ),
    Measure(
        "sampled_recall",
        overlap.best_sampled_recall,
        "the most that one of several sampled answers tells",
        needs="samples",
    ),
)

MEASURES: Mapping[str, Measure] = MappingProxyType({m.name: m for m in _TABLE})
"""All measures by name; those on text are always taken, others where asked for."""

RECALL = "rouge_l_recall"
REFUSAL = "refusal"


def select_measures(
    named: Sequence[str] = (), refusal_phrases: Sequence[str] = refusal.REFUSAL_PHRASES
) -> tuple[Measure, ...]:
    """Return the measures on text, and of the others those that are named.

    Raises:
        ConfigurationError: A name is unknown.
    """
    for name in named:
        if name not in MEASURES:
            raise ConfigurationError(
                f"measure {name!r} is unknown; choose from {', '.join(MEASURES)}"
            )
    taken = [m for m in MEASURES.values() if m.needs == "text" or m.name in named]
    phrased = refusal.refusal_score(refusal_phrases)
    return tuple(dataclasses.replace(m, score=phrased) if m.name == REFUSAL else m for m in taken)
