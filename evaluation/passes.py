"""Passes over a model beside its greedy answers, made where a measure needs them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from duet_unlearn.evaluation.answers import sample_answers, score_references
from duet_unlearn.evaluation.config import EvalConfig
from duet_unlearn.evaluation.measures import MEASURES, Answer, Likelihood
from duet_unlearn.evaluation.subjects import Prompt, Subject
from duet_unlearn.evaluation.tasks import Task
from duet_unlearn.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_passes(
    config: EvalConfig,
    subject: Subject,
    tasks: Sequence[Task],
    rows: Mapping[str, Sequence[Prompt]],
    answers: Mapping[str, list[Answer]],
) -> None:
    """Add to the plain answers of each row what the measures named look at.

    Args:
        config: Names the measures.
        subject: The model; it is loaded only if one of them needs it.
        tasks: What was asked.
        rows: Of each row its prompts, one a task.
        answers: Of each row its answers, one a task; changed in place.

    Raises:
        ConfigurationError: The memory does not hold one prompt.
    """
    needs = {MEASURES[name].needs for name in config.measures} - {"text"}
    if not needs:
        return
    model = subject.load()
    for label, prompts in rows.items():
        if "likelihood" in needs:
            _add_likelihoods(config, subject, model, tasks, prompts, answers[label])
        if "samples" in needs:
            _add_samples(config, subject, model, tasks, prompts, answers[label])


def _add_likelihoods(
    config: EvalConfig,
    subject: Subject,
    model: "PreTrainedModel",
    tasks: Sequence[Task],
    prompts: Sequence[Prompt],
    answers: list[Answer],
) -> None:
    """Add how likely the model finds the right answer and the wrong ones."""
    # A base that says nothing leaves nothing to score.
    plain = [i for i, task in enumerate(tasks) if task.attack is None and task.query.answer]
    pairs = [
        (index, text)
        for index in plain
        for text in (tasks[index].query.answer or "", *tasks[index].query.wrong_answers)
    ]
    with Progress(f"scoring {subject.label}", len(pairs), "given answers") as progress:
        scored = score_references(
            model,
            [prompts[index] for index, _ in pairs],
            [subject.renderer.begun_ids(text) for _, text in pairs],
            batch_size=config.batch_size,
            on_scored=progress.update,
        )
    found: dict[int, list[Likelihood]] = {index: [] for index in plain}
    for (index, _), likelihood in zip(pairs, scored, strict=True):
        found[index].append(likelihood)
    for index, (reference, *wrong) in found.items():
        answers[index] = dataclasses.replace(
            answers[index], reference=reference, wrong=tuple(wrong)
        )


def _add_samples(
    config: EvalConfig,
    subject: Subject,
    model: "PreTrainedModel",
    tasks: Sequence[Task],
    prompts: Sequence[Prompt],
    answers: list[Answer],
) -> None:
    """Add answers that are drawn and not the likeliest; the same in every evaluation."""
    plain = [i for i, task in enumerate(tasks) if task.attack is None]
    drawn: dict[int, list[str]] = {index: [] for index in plain}
    total = len(plain) * config.samples
    with Progress(f"sampling {subject.label}", total, "answers") as progress:
        for position, ids in sample_answers(
            model,
            [prompts[index] for index in plain for _ in range(config.samples)],
            eos_token_ids=subject.ends,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        ):
            drawn[plain[position // config.samples]].append(subject.decode(ids))
            progress.update()
    for index, texts in drawn.items():
        answers[index] = dataclasses.replace(answers[index], samples=tuple(texts))
