"""`duet-distill eval`: what models still answer, plainly and under attack, side by side.

Every row of the result (a model, or the first model with the steering prefix) answers the same
tasks: each query plainly, and each forget and retain query again behind every attack. One model
is in memory at a time. All prompts are rendered before the first one is loaded, so that a query
that does not fit is found in seconds.
"""

import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from duet_unlearn.data.models.adapters import resolve_with_adapter
from duet_unlearn.data.models.folder import (
    context_length,
    eos_token_ids,
    read_config,
)
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.data.shapes import Shape, load_shapes
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.results import EvalReport, QuerySet, Response, Task
from duet_unlearn.evaluation.scoring import score_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ATTACKED_SPLITS = ("forget", "retain")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """One model with the prompts of all rows that it answers."""

    spec: ModelSpec
    folder: Path
    adapter: Path | None
    """A LoRA adapter on top of the model in `folder`."""
    tokenizer: "PreTrainedTokenizerBase"
    prompts: dict[str, list[list[int]]]
    """By row label, one prompt a task."""


def evaluate(config: EvalConfig) -> EvalReport:
    """Answer all queries with all models and score the answers.

    Raises:
        ConfigurationError: the prefix or an attack cannot be used, or a batch does not fit.
        DataError: a query source or a model cannot be used; a query has no answer, or is too
            long for a model.
    """
    prefix = None if config.prefix is None else resolve_prefix(config.prefix, config.topic)
    attacks = load_attacks(config.attacks)
    sets = load_sets(config)
    tasks = list_tasks(sets, attacks)
    subjects = [
        _open_subject(config, spec, prefix if index == 0 else None, tasks)
        for index, spec in enumerate(config.models)
    ]
    responses: dict[str, tuple[Response, ...]] = {}
    with tqdm(
        total=len(tasks) * len(config.labels),
        desc="answering",
        unit="answer",
        disable=not sys.stderr.isatty(),
    ) as bar:
        for subject in subjects:
            bar.set_postfix_str(subject.spec.label, refresh=False)
            for label, texts in _answer(config, subject, bar).items():
                responses[label] = tuple(
                    Response(text=text, scores=score_response(task.query.answer or "", text))
                    for task, text in zip(tasks, texts, strict=True)
                )
    return EvalReport(
        config=config, prefix=prefix, attacks=attacks, sets=sets, tasks=tasks, responses=responses
    )


def load_attacks(sources: Sequence[str]) -> tuple[Shape, ...]:
    """All wrappers, each text once, under names that differ."""
    attacks: dict[str, Shape] = {}
    for source in sources:
        for wrapper in load_shapes(source):
            name, number = wrapper.name, 2
            while name in attacks and attacks[name].text != wrapper.text:
                name, number = f"{wrapper.name} ({number})", number + 1
            attacks.setdefault(name, Shape(name=name, text=wrapper.text))
    return tuple(attacks.values())


def load_sets(config: EvalConfig) -> tuple[QuerySet, ...]:
    """All query sets, each named by its split and, where the split has several, its file."""
    sets: list[QuerySet] = []
    for split, source in config.sources:
        queries = load_queries(source, split=split, require_answers=True)
        if config.limit is not None:
            queries = spread(queries, config.limit)
        alone = sum(other == split for other, _ in config.sources) == 1
        name = base = split if alone else f"{split} {Path(source).stem}"
        number = 2
        while any(name == other.name for other in sets):
            name, number = f"{base} ({number})", number + 1
        sets.append(QuerySet(name=name, split=split, source=source, queries=tuple(queries)))
    return tuple(sets)


def spread(queries: Sequence[Query], limit: int) -> list[Query]:
    """Return at most `limit` queries at even distances: files are often sorted by kind."""
    count = min(limit, len(queries))
    return [queries[i * len(queries) // count] for i in range(count)]


def list_tasks(sets: Sequence[QuerySet], attacks: Sequence[Shape]) -> tuple[Task, ...]:
    """Every query plainly, then every forget and retain query behind each attack."""
    return tuple(
        Task(set_name=query_set.name, query=query, attack=attack)
        for attack in (None, *attacks)
        for query_set in sets
        if attack is None or query_set.split in ATTACKED_SPLITS
        for query in query_set.queries
    )


def _open_subject(
    config: EvalConfig, spec: ModelSpec, prefix: str | None, tasks: Sequence[Task]
) -> _Subject:
    """Find a model and render its prompts, with and without the prefix where it has one."""
    folder, adapter = resolve_with_adapter(spec.model)
    tokenizer = load_tokenizer(folder)
    renderer = PromptRenderer(tokenizer, prefix=prefix, place=config.prefix_place)
    conversations = [
        task.query.messages if task.attack is None else task.attack.apply(task.query.messages)
        for task in tasks
    ]
    prompts = {spec.label: [renderer.student_ids(messages) for messages in conversations]}
    if prefix is not None and config.prefixed_label is not None:
        prompts[config.prefixed_label] = [renderer.teacher_ids(m) for m in conversations]
    limit = context_length(read_config(folder))
    for label, rendered in prompts.items():
        for task, prompt in zip(tasks, rendered, strict=True):
            check_length(task, len(prompt), label, limit, config.max_new_tokens)
    return _Subject(spec=spec, folder=folder, adapter=adapter, tokenizer=tokenizer, prompts=prompts)


def check_length(task: Task, length: int, label: str, limit: int | None, new_tokens: int) -> None:
    """Refuse a prompt that is empty or leaves no room for its answer.

    Raises:
        DataError: It is one of the two.
    """
    where = f"query {task.query.query_id} of {task.set_name}"
    if task.attack is not None:
        where += f" under attack {task.attack.name}"
    if length == 0:
        raise DataError(f"{where}: its prompt has no token in model {label}; write a longer query")
    if limit is not None and length + new_tokens > limit:
        raise DataError(
            f"{where}: {length} tokens of prompt and {new_tokens} of answer do not fit into the "
            f"{limit} that {label} reads; shorten the query or lower --max-new-tokens"
        )


def _answer(config: EvalConfig, subject: _Subject, bar: "tqdm[Any]") -> dict[str, list[str]]:
    """Return the responses of each row of one model; equal prompts are answered once."""
    copies: dict[tuple[int, ...], int] = {}
    for rendered in subject.prompts.values():
        for prompt in rendered:
            copies[tuple(prompt)] = copies.get(tuple(prompt), 0) + 1
    distinct = list(copies)
    model = load_model(subject.folder, dtype=config.dtype, adapter=subject.adapter)
    ends = eos_token_ids(subject.folder)
    if not ends:
        logger.warning(
            "model %s names no end of sequence: every answer has %d tokens",
            subject.spec.label,
            config.max_new_tokens,
        )

    def advance(batch: Sequence[int]) -> None:
        bar.update(sum(copies[distinct[index]] for index in batch))

    answers = generate_answers(
        model,
        distinct,
        eos_token_ids=ends,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        on_batch=advance,
    )
    del model
    _free_memory()
    texts = subject.tokenizer.batch_decode(answers, skip_special_tokens=True)
    by_prompt = {prompt: text.strip() for prompt, text in zip(distinct, texts, strict=True)}
    return {
        label: [by_prompt[tuple(prompt)] for prompt in rendered]
        for label, rendered in subject.prompts.items()
    }


def _free_memory() -> None:
    """Give the last model's memory back before the next one comes."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
