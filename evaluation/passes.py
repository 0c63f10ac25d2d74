"""Passes over a model beside its greedy answers, made where a measure needs them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from duet_unlearn.evaluation.answers import score_references, stream_answers
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
    plain = [i for i, task in enumerate(tasks) if task.attack is None]
    for label, prompts in rows.items():
        own = answers[label]
        if "likelihood" in needs:
            given = {i: (tasks[i].query.answer, *tasks[i].query.wrong_answers) for i in plain}
            scored = _likelihoods(config, subject, model, prompts, given)
            for index, (reference, *wrong) in scored.items():
                own[index] = dataclasses.replace(
                    own[index], reference=reference, wrong=tuple(wrong)
                )
        if "samples" in needs:
            for index, texts in _samples(config, subject, model, prompts, plain).items():
                own[index] = dataclasses.replace(own[index], samples=tuple(texts))


def _likelihoods(
    config: EvalConfig,
    subject: Subject,
    model: "PreTrainedModel",
    prompts: Sequence[Prompt],
    given: Mapping[int, Sequence[str | None]],
) -> dict[int, list[Likelihood]]:
    """Return how likely the model finds the right answer and the wrong ones, by task."""
    # A base that says nothing leaves nothing to score.
    pairs = [(at, text or "") for at, texts in given.items() if texts[0] for text in texts]
    with Progress(f"scoring {subject.label}", len(pairs), "given answers") as progress:
        scored = score_references(
            model,
            [prompts[index] for index, _ in pairs],
            [subject.renderer.begun_ids(text) for _, text in pairs],
            batch_size=config.batch_size,
            on_scored=progress.update,
        )
    found: dict[int, list[Likelihood]] = {}
    for (index, _), likelihood in zip(pairs, scored, strict=True):
        found.setdefault(index, []).append(likelihood)
    return found


def _samples(
    config: EvalConfig,
    subject: Subject,
    model: "PreTrainedModel",
    prompts: Sequence[Prompt],
    plain: Sequence[int],
) -> dict[int, list[str]]:
    """Return drawn answers in place of the likeliest, by task; the same in every evaluation."""
    import torch

    drawn: dict[int, list[str]] = {index: [] for index in plain}
    total = len(plain) * config.samples
    with (
        Progress(f"sampling {subject.label}", total, "answers") as progress,
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        for position, ids in stream_answers(
            model,
            [prompts[index] for index in plain for _ in range(config.samples)],
            eos_token_ids=subject.ends,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            sampled=True,
        ):
            drawn[plain[position // config.samples]].append(subject.decode(ids))
            progress.update()
    return drawn
