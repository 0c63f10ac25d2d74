"""`duet-distill eval`: what models still answer, plainly and under attack, side by side.

Every row of the result (a model, or the first model with the steering prefix) answers the same
tasks: each query plainly, and each forget and retain query again under every attack. One model
is in memory at a time. All prompts are rendered before the first one is loaded, so that a query
that does not fit is found in seconds.
"""

import contextlib
import dataclasses
import gc
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from duet_unlearn.data.models.adapters import resolve_with_adapter
from duet_unlearn.data.models.folder import context_length, eos_token_ids, read_config
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.evaluation.answers import stream_answers
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.likelihoods import score_references
from duet_unlearn.evaluation.measures import MEASURES, Answer, Likelihood, select_measures
from duet_unlearn.evaluation.measures.refusal import REFUSAL_PHRASES, load_phrases
from duet_unlearn.evaluation.results import EvalReport
from duet_unlearn.evaluation.tasks import Task, check_length, list_tasks, load_attacks, load_sets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = tuple[int, ...]

Respond = Callable[[Path, Sequence[Prompt], Sequence[int]], Iterator[tuple[int, list[int]]]]
"""Another engine than transformers: from a model folder, prompts and the ids that end an answer to
the index of a prompt and its greedy answer, in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """One model with the prompts of all rows that it answers."""

    spec: ModelSpec
    folder: Path
    adapter: Path | None
    """A LoRA adapter on top of the model in `folder`."""
    tokenizer: "PreTrainedTokenizerBase"
    renderer: PromptRenderer
    prompts: dict[str, list[Prompt]]
    """By row label, one prompt a task."""


def evaluate(config: EvalConfig, respond: Respond | None = None) -> EvalReport:
    """Answer all queries with all models and score the answers.

    Args:
        config: what to ask whom.
        respond: what answers instead of transformers; measures on likelihood need those still.

    Raises:
        ConfigurationError: the prefix, a measure or an attack cannot be used, or a batch does not
            fit.
        DataError: a query source or a model cannot be used; a query has no answer, or is too
            long for a model.
    """
    prefix = None if config.prefix is None else resolve_prefix(config.prefix, config.topic)
    phrases = [phrase for source in config.refusals for phrase in load_phrases(source)]
    measures = select_measures(config.measures, (*REFUSAL_PHRASES, *phrases))
    attacks = load_attacks(config.attacks)
    sets = load_sets(config.sources, limit=config.limit)
    tasks = list_tasks(sets, attacks)
    subjects = [
        _open_subject(config, spec, prefix if index == 0 else None, tasks)
        for index, spec in enumerate(config.models)
    ]
    answers: dict[str, Sequence[Answer]] = {}
    with tqdm(
        total=len(tasks) * len(config.labels),
        desc="answering",
        unit="answer",
        disable=not sys.stderr.isatty(),
    ) as bar:
        for subject in subjects:
            bar.set_postfix_str(subject.spec.label, refresh=False)
            answers.update(_answer_all(config, subject, tasks, bar, respond))
            _free_memory()
    return EvalReport(
        config=config,
        prefix=prefix,
        attacks=attacks,
        sets=sets,
        tasks=tasks,
        answers=answers,
        measures=measures,
    )


def _open_subject(
    config: EvalConfig, spec: ModelSpec, prefix: str | None, tasks: Sequence[Task]
) -> _Subject:
    """Find a model and render its prompts, with and without the prefix where it has one."""
    folder, adapter = resolve_with_adapter(spec.model)
    tokenizer = load_tokenizer(folder)
    renderer = PromptRenderer(tokenizer, prefix=prefix, place=config.prefix_place)
    prompts = {spec.label: [tuple(task.render(renderer)) for task in tasks]}
    if prefix is not None and config.prefixed_label is not None:
        prompts[config.prefixed_label] = [
            tuple(task.render(renderer, prefixed=True)) for task in tasks
        ]
    limit = context_length(read_config(folder))
    for label, rendered in prompts.items():
        for task, prompt in zip(tasks, rendered, strict=True):
            check_length(task, len(prompt), label, limit, config.max_new_tokens)
    return _Subject(
        spec=spec,
        folder=folder,
        adapter=adapter,
        tokenizer=tokenizer,
        renderer=renderer,
        prompts=prompts,
    )


def _answer_all(
    config: EvalConfig,
    subject: _Subject,
    tasks: Sequence[Task],
    bar: "tqdm[Any]",
    respond: Respond | None,
) -> dict[str, list[Answer]]:
    """Return the answers of each row of one model, with likelihoods where a measure needs them."""
    model = None
    if respond is None:
        model = load_model(subject.folder, dtype=config.dtype, adapter=subject.adapter)
        answers = _answer(config, subject, _transformers(config, model), bar)
    else:
        with _merged(subject, config.dtype) as folder:
            answers = _answer(config, subject, partial(respond, folder), bar)
    if not any(MEASURES[name].likelihood for name in config.measures):
        return answers
    if model is None:
        model = load_model(subject.folder, dtype=config.dtype, adapter=subject.adapter)
    return {
        label: _with_likelihoods(config, subject, model, tasks, label, found)
        for label, found in answers.items()
    }


def _answer(
    config: EvalConfig,
    subject: _Subject,
    respond: Callable[[Sequence[Prompt], Sequence[int]], Iterable[tuple[int, list[int]]]],
    bar: "tqdm[Any]",
) -> dict[str, list[Answer]]:
    """Return the answers of each row of one model; equal prompts are answered once."""
    copies = _count(prompt for rendered in subject.prompts.values() for prompt in rendered)
    distinct = list(copies)
    ends = eos_token_ids(subject.folder)
    if not ends:
        logger.warning(
            "model %s names no end of sequence: every answer has %d tokens",
            subject.spec.label,
            config.max_new_tokens,
        )
    by_prompt: dict[Prompt, Answer] = {}
    for index, ids in respond(distinct, ends):
        text = str(subject.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        by_prompt[distinct[index]] = Answer(text=text, token_ids=tuple(ids))
        bar.update(copies[distinct[index]])
    return {
        label: [by_prompt[prompt] for prompt in rendered]
        for label, rendered in subject.prompts.items()
    }


def _transformers(
    config: EvalConfig, model: "PreTrainedModel"
) -> Callable[[Sequence[Prompt], Sequence[int]], Iterator[tuple[int, list[int]]]]:
    def respond(prompts: Sequence[Prompt], ends: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        return stream_answers(
            model,
            prompts,
            eos_token_ids=ends,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )

    return respond


@contextlib.contextmanager
def _merged(subject: _Subject, dtype: str) -> Iterator[Path]:
    """Give a folder that any engine loads: the model's own, or one with the adapter in it."""
    if subject.adapter is None:
        yield subject.folder
        return
    with tempfile.TemporaryDirectory(prefix="duet-merged-") as scratch:
        for path in subject.folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copy(path, scratch)
        model = load_model(subject.folder, dtype=dtype, adapter=subject.adapter)
        model.save_pretrained(scratch)
        yield Path(scratch)


def _count(prompts: Iterable[Prompt]) -> dict[Prompt, int]:
    counts: dict[Prompt, int] = {}
    for prompt in prompts:
        counts[prompt] = counts.get(prompt, 0) + 1
    return counts


def _with_likelihoods(
    config: EvalConfig,
    subject: _Subject,
    model: "PreTrainedModel",
    tasks: Sequence[Task],
    label: str,
    answers: Sequence[Answer],
) -> list[Answer]:
    """Return the answers with the likelihoods of right and wrong ones, asked plainly."""
    plain = [index for index, task in enumerate(tasks) if task.attack is None]
    pairs = [
        (index, text)
        for index in plain
        for text in (tasks[index].query.answer or "", *tasks[index].query.wrong_answers)
    ]
    scored = score_references(
        model,
        [subject.prompts[label][index] for index, _ in pairs],
        [subject.renderer.begun_ids(text) for _, text in pairs],
        batch_size=config.batch_size,
    )
    by_task: dict[int, list[Likelihood]] = {}
    for (index, _), likelihood in zip(pairs, scored, strict=True):
        by_task.setdefault(index, []).append(likelihood)
    return [
        answer
        if index not in by_task
        else dataclasses.replace(
            answer, reference=by_task[index][0], wrong=tuple(by_task[index][1:])
        )
        for index, answer in enumerate(answers)
    ]


def _free_memory() -> None:
    """Give the last model's memory back before the next one comes."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
