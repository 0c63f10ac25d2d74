"""`duet-distill relearn`: fine-tune models on lessons and ask what the lessons do not teach.

Forgetting that a few steps of fine-tuning undo is hiding ("relearning attack": Hu et al., arXiv
2406.13356; Lynch et al., arXiv 2402.16835). Every model, lesson and learning rate starts from the
model's own weights. A model that never knew shows what the lessons alone give away.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from duet_unlearn.data.queries import Query
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.distill.relearning.fine_tuning import fine_tune
from duet_unlearn.distill.relearning.lessons import Lesson, Pair, list_lessons
from duet_unlearn.distill.relearning.results import Curve, Look, RelearnReport
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.measures.overlap import best_of, contains_answer, rouge_l_recall
from duet_unlearn.evaluation.statistics import Number, summarize_all
from duet_unlearn.evaluation.subjects import Prompt, Subject, free_memory, open_subjects
from duet_unlearn.evaluation.tasks import Task, load_answered, spread
from duet_unlearn.progress import Progress


def relearn(config: RelearnConfig) -> RelearnReport:
    """Fine-tune every model on every lesson at every rate, and ask at every step named.

    Raises:
        ConfigurationError: The memory does not hold a step, or peft is not installed.
        DataError: A query source or a model cannot be used, or a lesson leaves nothing to ask.
    """
    lessons = list_lessons(config)
    kept = spread(load_answered(config.retain, split="retain"), config.limit)
    subjects = open_subjects(config, config.resolved_prefix)
    curves: list[Curve] = []
    for subject in subjects:  # what is too long is refused before any work
        for lesson in lessons:
            _encode(config, subject, lesson, [*lesson.asked, *kept])
    for subject in subjects:
        total = len(lessons) * len(config.listed_rates) * max(config.listed_steps)
        with Progress(f"teaching {subject.label}", total, "steps") as progress:
            for lesson in lessons:
                curves += teach(config, subject, lesson, kept, on_step=progress.update)
    return RelearnReport(config=config, lessons=lessons, curves=tuple(curves))


def teach(
    config: RelearnConfig,
    subject: Subject,
    lesson: Lesson,
    kept: Sequence[Query] = (),
    *,
    on_step: Callable[[int], object] = lambda _count: None,
) -> list[Curve]:
    """Return the curve of each row and rate for one model, loaded anew for each, and one lesson.

    A row behind the prefix is asked behind it; what is taught has none, as whoever fine-tunes a
    model does not write its deployer's prompt. `kept` are further queries: whether the model still
    answers what it should keep.

    Raises:
        ConfigurationError: The memory does not hold a step, or peft is not installed.
        DataError: The model cannot be loaded, or a query is too long for it.
    """
    queries = [*lesson.asked, *kept]
    pairs, rows = _encode(config, subject, lesson, queries)
    untrained: list[dict[str, Look]] = []

    def look(model: Any, step: int) -> dict[str, Look]:
        if step == 0 and untrained:  # the same weights, whatever the rate
            return untrained[0]
        found = {}
        for label, prompts in rows.items():
            answers = generate_answers(
                model,
                prompts,
                eos_token_ids=subject.ends,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
            )
            texts = [subject.decode(ids) for ids in answers]
            found[label] = _score(step, queries, texts, len(lesson.asked))
        if step == 0:
            untrained.append(found)
        return found

    curves = []
    for rate in config.listed_rates:
        looks = fine_tune(config, subject.load(), pairs, look, rate=rate, on_step=on_step)
        free_memory()
        curves += [
            Curve(
                model=label,
                lesson=lesson.name,
                learning_rate=rate,
                looks=tuple(found[label] for found in looks),
            )
            for label in rows
        ]
    return curves


def _encode(
    config: RelearnConfig, subject: Subject, lesson: Lesson, queries: Sequence[Query]
) -> tuple[list[Pair], dict[str, list[Prompt]]]:
    """Return what is taught, and the prompts of what is asked in each row."""
    tasks = [Task(set_name=query.split, query=query) for query in queries]
    rows = {label: subject.render(label, tasks, config.max_new_tokens) for label in subject.rows}
    return lesson.encode(subject), rows


def _score(step: int, queries: Sequence[Query], texts: Sequence[str], asked: int) -> Look:
    """The first `asked` queries are to be forgotten, the rest is to be kept."""
    said = list(zip(queries, texts, strict=True))
    return Look(
        step=step,
        recalled=_mean(rouge_l_recall, said[:asked]),
        named=_mean(contains_answer, said[:asked]),
        retained=_mean(rouge_l_recall, said[asked:]) if said[asked:] else None,
        texts=tuple(texts[:asked]),
    )


def _mean(score: Callable[[str, str], float], said: Sequence[tuple[Query, str]]) -> Number:
    scores = [best_of(score, query.references, text) for query, text in said]
    return summarize_all(np.array(scores, dtype=float))
