"""`duet-distill attack`: search what makes models say again what they should have forgotten.

The attacks of `eval` are written by hand; here they are searched, with the weights at hand: a
*suffix* of tokens behind the query, and a *soft prompt* of vectors at the same place, which nobody
can type and which is freer than any text. Both are trained on the answers of some forget queries
and judged on others, whose answers they never saw. Every model, and the first one behind its
prefix, is attacked on its own. How far a model that never knew comes says what an attack teaches;
retain queries behind the same attack say what it breaks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet_unlearn.data.queries import Query
from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.distill.attacking.prompts import Prompt, open_prompts, render
from duet_unlearn.distill.attacking.results import PLAIN, SOFT, SUFFIX, AttackReport, Outcome
from duet_unlearn.distill.attacking.soft_tokens import soft_tokens, train_soft_prompt
from duet_unlearn.distill.attacking.suffix import SuffixSearch
from duet_unlearn.distill.relearning.lessons import untaught
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.answers import generate_answers, score_references
from duet_unlearn.evaluation.measures.overlap import best_of, contains_answer, rouge_l_recall
from duet_unlearn.evaluation.statistics import summarize, summarize_all
from duet_unlearn.evaluation.subjects import Subject, free_memory, open_subjects
from duet_unlearn.evaluation.tasks import Task, load_answered, spread
from duet_unlearn.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row of one model with its prompts."""

    subject: Subject
    label: str
    train: list[Prompt]
    asked: list[Prompt]
    """Forget queries, then retain queries."""


def attack(config: AttackConfig) -> AttackReport:
    """Attack every model, and the first one behind the prefix, and ask what was not trained on.

    Raises:
        ConfigurationError: The prefix cannot be used, or the memory does not hold a step.
        DataError: A source or a model cannot be used, a query is too long, or the training queries
            leave nothing to ask.
    """
    train, asked = _split(config)
    kept = spread(load_answered(config.retain, split="retain"), config.limit)
    subjects = open_subjects(config, config.resolved_prefix)
    # All prompts first: a query that does not fit is found in seconds.
    rows = [
        [_open(config, subject, label, train, [*asked, *kept]) for label in subject.rows]
        for subject in subjects
    ]
    outcomes: list[Outcome] = []
    for subject, of_subject in zip(subjects, rows, strict=True):
        model: Any = subject.load()
        model.requires_grad_(False)
        for row in of_subject:
            outcomes += _attack_row(config, model, row)
        del model
        free_memory()
    return AttackReport(
        config=config,
        prefix=config.resolved_prefix,
        train=tuple(train),
        asked=(*asked, *kept),
        outcomes=outcomes,
    )


def _split(config: AttackConfig) -> tuple[list[Query], list[Query]]:
    """Return what the attacks are trained on, and forget queries that this does not give away."""
    forget = load_answered(config.forget, split="forget")
    if config.train:
        train = load_answered(config.train, split="forget")
    else:
        count = round(config.share * len(forget))
        train = random.Random(config.seed).sample(forget, count)
    asked = untaught(forget, train)
    if not train or not asked:
        raise DataError(
            f"training on {len(train)} queries leaves {len(asked)} of {len(forget)} forget queries "
            "to ask, expected at least one of both; change --share, or give --train other queries"
        )
    return train, spread(asked, config.limit)


def _open(
    config: AttackConfig,
    subject: Subject,
    label: str,
    train: Sequence[Query],
    asked: Sequence[Query],
) -> _Row:
    added = max(config.suffix_tokens, config.soft_tokens)
    tasks = [Task(set_name=query.split, query=query) for query in (*train, *asked)]
    subject.render(label, tasks, config.max_new_tokens + added)  # are they short enough?
    opened = open_prompts(subject, label, [*train, *asked], suffix_tokens=config.suffix_tokens)
    at = len(train)
    return _Row(subject=subject, label=label, train=opened[:at], asked=opened[at:])


def _attack_row(config: AttackConfig, model: Any, row: _Row) -> list[Outcome]:
    """Return what one row says plainly, behind a suffix and behind a soft prompt."""
    steps = config.suffix_steps + config.soft_steps
    with Progress(f"attacking {row.label}", steps, "steps") as progress:
        outcomes = [_ask(config, model, row, PLAIN)]
        if config.suffix_steps:
            search = SuffixSearch(config, row.subject, row.label, model, row.train)
            suffix = search.run(progress.update)
            outcomes.append(_ask(config, model, row, SUFFIX, suffix=suffix))
        if config.soft_steps:
            vectors = train_soft_prompt(config, model, row.train, on_step=progress.update)
            with soft_tokens(model, vectors) as ids:
                outcomes.append(_ask(config, model, row, SOFT, ids=ids))
    return outcomes


def _ask(
    config: AttackConfig,
    model: Any,
    row: _Row,
    attack: str,
    *,
    suffix: str = "",
    ids: Sequence[int] = (),
) -> Outcome:
    """Ask under one attack."""

    def prompts(opened: Sequence[Prompt]) -> list[list[int]]:
        if suffix:  # typed anew for every query, as a user would
            return [render(row.subject, row.label, prompt.query, suffix) for prompt in opened]
        return [prompt.holding(ids) for prompt in opened]

    answers = generate_answers(
        model,
        prompts(row.asked),
        eos_token_ids=row.subject.ends,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    fitted = score_references(
        model,
        prompts(row.train),
        [prompt.answer for prompt in row.train],
        batch_size=config.batch_size,
    )
    logs = [log for likelihood in fitted for log in likelihood.log_probabilities]
    texts = [row.subject.decode(answer) for answer in answers]
    said = [(p.query.references, text) for p, text in zip(row.asked, texts, strict=True)]
    recalls = np.array([best_of(rouge_l_recall, *pair) for pair in said])
    named = np.array([best_of(contains_answer, *pair) for pair in said])
    to_forget = np.array([prompt.query.split == "forget" for prompt in row.asked])
    return Outcome(
        model=row.label,
        attack=attack,
        suffix=suffix or None,
        loss=-float(np.mean(logs)),
        recalled=summarize_all(recalls[to_forget]),
        named=summarize_all(named[to_forget]),
        retained=summarize(recalls[~to_forget]),
        texts=tuple(texts),
    )
