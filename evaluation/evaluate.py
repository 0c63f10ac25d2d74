"""`duet-distill eval`: what models still answer, plainly and under attack, side by side.

Every row of the result (a model, or the first model with the steering prefix) answers the same
tasks: each query plainly, and each forget and retain query again under every attack. One model
is in memory at a time. All prompts are rendered before the first one is loaded, so that a query
that does not fit is found in seconds.
"""

import dataclasses
import itertools
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from duet_unlearn.data.models.loading import no_bars
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.answers import stream_answers
from duet_unlearn.evaluation.config import EvalConfig
from duet_unlearn.evaluation.harness import Harness, Scores
from duet_unlearn.evaluation.measures import Answer, select_measures
from duet_unlearn.evaluation.measures.refusal import REFUSAL_PHRASES, load_phrases
from duet_unlearn.evaluation.passes import add_passes
from duet_unlearn.evaluation.requirements import check_names
from duet_unlearn.evaluation.results import EvalReport
from duet_unlearn.evaluation.subjects import Prompt, Subject, free_memory, open_subjects
from duet_unlearn.evaluation.tasks import (
    Task,
    list_tasks,
    load_attacks,
    load_sets,
    without_answers,
)
from duet_unlearn.progress import Progress

logger = logging.getLogger(__name__)

Respond = Callable[[Path, Sequence[Prompt], Sequence[int]], Iterator[tuple[int, list[int]]]]
"""Another engine than transformers: from a model folder, prompts and the ids that end an answer to
the index of a prompt and its greedy answer, in any order."""


def evaluate(config: EvalConfig, respond: Respond | None = None) -> EvalReport:
    """Answer all queries with all models and score the answers.

    Args:
        config: what to ask whom.
        respond: what answers instead of transformers; measures on more than text need those still.

    Raises:
        ConfigurationError: the prefix, a measure or an attack cannot be used, or a batch does not
            fit.
        DataError: a query source or a model cannot be used; a query has no answer, or is too
            long for a model.
    """
    if respond is not None and config.quantize:
        raise ConfigurationError(
            "quantize needs --engine transformers: another engine loads the folder as it is; leave "
            "one of the two out"
        )
    harness = Harness(config) if config.lm_eval else None
    prefix = config.resolved_prefix
    phrases = [phrase for source in config.refusals for phrase in load_phrases(source)]
    measures = select_measures(config.measures, (*REFUSAL_PHRASES, *phrases))
    attacks = load_attacks(config.attacks)
    sets = load_sets(config.sources, limit=config.limit, answered=config.answers == "file")
    if config.require:
        check_names(config.require, sets)
    if not all(query.answer for s in sets for query in s.queries):
        attacks = without_answers(attacks)
    tasks = list_tasks(sets, attacks)
    subjects = open_subjects(config, prefix)
    prompts = [
        {label: subject.render(label, tasks, config.max_new_tokens) for label in subject.rows}
        for subject in subjects
    ]
    answers: dict[str, Sequence[Answer]] = {}
    lm_eval: dict[str, Scores] = {}
    for subject, rows in zip(subjects, prompts, strict=True):
        by_row = _answer(config, subject, rows, respond)
        if config.answers == "base" and not answers:
            tasks = _answered_by(tasks, by_row[subject.label])
        add_passes(config, subject, tasks, rows, by_row)
        answers.update(by_row)
        free_memory()
        if harness is not None:
            lm_eval[subject.label] = harness.measure(subject)
            free_memory()
    return EvalReport(
        config=config,
        prefix=prefix,
        attacks=attacks,
        sets=sets,
        tasks=tasks,
        answers=answers,
        measures=measures,
        lm_eval=lm_eval,
    )


def _answer(
    config: EvalConfig,
    subject: Subject,
    rows: Mapping[str, Sequence[Prompt]],
    respond: Respond | None,
) -> dict[str, list[Answer]]:
    """Return the answers of each row of one model; equal prompts are answered once."""
    copies = Counter(itertools.chain.from_iterable(rows.values()))
    distinct = list(copies)
    if not subject.ends:
        logger.warning(
            "model %s names no end of sequence: every answer has %d tokens",
            subject.label,
            config.max_new_tokens,
        )
    if respond is None:
        found = stream_answers(
            subject.load(),
            distinct,
            eos_token_ids=subject.ends,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
    else:
        found = _respond_merged(respond, subject, distinct)
    by_prompt: dict[Prompt, Answer] = {}
    with Progress(f"asking {subject.label}", copies.total(), "answers") as progress:
        for index, ids in found:
            prompt = distinct[index]
            by_prompt[prompt] = Answer(text=subject.decode(ids), token_ids=tuple(ids))
            progress.update(copies[prompt])
    return {label: [by_prompt[prompt] for prompt in row] for label, row in rows.items()}


def _answered_by(tasks: Sequence[Task], base: Sequence[Answer]) -> tuple[Task, ...]:
    """Return the tasks with what the base says to the plain query as the right answer."""
    said = {
        (task.set_name, task.query.query_id): answer.text
        for task, answer in zip(tasks, base, strict=True)
        if task.attack is None
    }
    return tuple(
        dataclasses.replace(
            task,
            query=dataclasses.replace(
                task.query,
                answer=said[task.set_name, task.query.query_id],
                aliases=(),
                wrong_answers=(),
            ),
        )
        for task in tasks
    )


def _respond_merged(
    respond: Respond, subject: Subject, prompts: Sequence[Prompt]
) -> Iterator[tuple[int, list[int]]]:
    """Have another engine answer; it gets a folder with the adapter in the weights."""
    if subject.adapter is None:
        yield from respond(subject.folder, prompts, subject.ends)
        return
    with tempfile.TemporaryDirectory(prefix="duet-merged-") as scratch:
        for path in subject.folder.iterdir():
            # The index of a base in several files says nothing of the one that is saved.
            weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
            if path.is_file() and not weights:
                shutil.copy(path, scratch)
        with no_bars():
            subject.load().save_pretrained(scratch)
        free_memory()
        yield from respond(Path(scratch), prompts, subject.ends)
