"""`duet-distill probe`: what every layer of a model still holds of answers that it does not give.

Two looks at the state at the last position of the prompt. The *logit lens* reads each layer as the
output head would: where the right answer's first token ranks high in the middle and low at the end,
the model knows and does not say. The *linear probe* finds what the head does not read, see
`linear_probe`.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from duet_unlearn.data.queries import Query
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.probing.config import ProbeConfig
from duet_unlearn.evaluation.probing.last_position import (
    Floats,
    LastPosition,
    output_vectors,
    read_last_positions,
)
from duet_unlearn.evaluation.probing.linear_probe import (
    Pairs,
    cross_validated,
    pair_queries,
    predict,
    shuffled_control,
    tells_apart,
)
from duet_unlearn.evaluation.probing.results import LayerLook, ProbeReport
from duet_unlearn.evaluation.statistics import summarize_all
from duet_unlearn.evaluation.subjects import Subject, free_memory, open_subjects
from duet_unlearn.evaluation.tasks import Task, load_answered, spread
from duet_unlearn.progress import Progress

_LEAST_PAIRS = 2
SPLITS = ("forget", "retain")


def probe(config: ProbeConfig) -> ProbeReport:
    """Look into every model, and the first one behind the prefix, layer by layer.

    Raises:
        ConfigurationError: The prefix cannot be used, or the memory does not hold a prompt.
        DataError: A source or a model cannot be used, a query has no answer or is too long, or too
            few queries have answers with different first tokens.
    """
    queries = [
        query
        for split in SPLITS
        for query in spread(load_answered(getattr(config, split), split=split), config.limit)
    ]
    at = sum(query.split == "forget" for query in queries)
    subjects = open_subjects(config, config.resolved_prefix)
    begun = [_begin_answers(subject, queries) for subject in subjects]
    tasks = [Task(set_name=query.split, query=query) for query in queries]
    prompts = [
        {label: subject.render(label, tasks, 0) for label in subject.rows} for subject in subjects
    ]
    pairs: dict[str, Pairs] = {}
    looks: list[LayerLook] = []
    reads: dict[str, list[dict[str, Any]]] = {}
    for subject, (leads, firsts), by_row in zip(subjects, begun, prompts, strict=True):
        model = subject.load()
        vectors = output_vectors(model, firsts)
        for label, rendered in by_row.items():
            with Progress(f"reading {label}", len(queries), "queries") as progress:
                found = read_last_positions(
                    model,
                    [[*prompt, *lead] for prompt, lead in zip(rendered, leads, strict=True)],
                    firsts,
                    batch_size=config.batch_size,
                    on_read=progress.update,
                )
            pairs = pairs or {
                "forget": _pair(vectors[:at], firsts[:at], "forget"),
                "retain": _pair(vectors[at:], firsts[at:], "retain"),
            }
            looks += _look(label, found, vectors, pairs, at)
            reads[label] = [{"ranks": p.ranks, "probabilities": p.probabilities} for p in found]
        del model
        free_memory()
    return ProbeReport(
        config=config,
        prefix=config.resolved_prefix,
        queries=tuple(queries),
        pairs={split: len(found) for split, found in pairs.items()},
        looks=tuple(looks),
        reads=reads,
    )


def _begin_answers(subject: Subject, queries: Sequence[Query]) -> tuple[list[list[int]], list[int]]:
    """Return each answer's first token that is more than white space, and those before it.

    Some tokenizers write the space between prompt and answer as a token of its own, which is the
    same for all answers.
    """
    leads, tokens = [], []
    for query in queries:
        ids = subject.renderer.begun_ids(query.answer or "")
        lead = list(takewhile(lambda token: not subject.decode([token]), ids))
        if len(lead) == len(ids):
            raise DataError(
                f"query {query.query_id}: its answer has no token in {subject.label}; write it out"
            )
        leads.append(lead)
        tokens.append(ids[len(lead)])
    return leads, tokens


def _pair(vectors_ND: Floats, tokens: Sequence[int], split: str) -> Pairs:
    pairs = pair_queries(vectors_ND, tokens)
    if len(pairs) < _LEAST_PAIRS:
        raise DataError(
            f"{len(tokens)} {split} queries make {len(pairs)} pairs whose answers differ in their "
            f"first token, expected at least {_LEAST_PAIRS}; give more queries"
        )
    return pairs


def _look(
    label: str,
    found: Sequence[LastPosition],
    vectors_ND: Floats,
    pairs: dict[str, Pairs],
    at: int,
) -> list[LayerLook]:
    """Return what each layer says; the first `at` queries are to be forgotten."""
    looks = []
    states_LND = np.stack([position.states for position in found], axis=1)
    ranks_NL = np.array([position.ranks for position in found])
    probabilities_NL = np.array([position.probabilities for position in found])
    vectors, train = vectors_ND[:at], vectors_ND[at:]
    for layer, states_ND in enumerate(states_LND):
        asked, kept = states_ND[:at], states_ND[at:]
        predicted = predict(kept, train, asked)
        looks.append(
            LayerLook(
                model=label,
                layer=layer + 1,
                rank=float(np.median(ranks_NL[:at, layer])),
                probability=summarize_all(probabilities_NL[:at, layer]),
                retain_rank=float(np.median(ranks_NL[at:, layer])),
                retain_probability=summarize_all(probabilities_NL[at:, layer]),
                told_apart=summarize_all(tells_apart(predicted, vectors, pairs["forget"])),
                shuffled=100 * shuffled_control(kept, train, asked, vectors, pairs["forget"]),
                retain_told_apart=summarize_all(cross_validated(kept, train, pairs["retain"])),
            )
        )
    return looks
