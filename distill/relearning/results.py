"""The result of a relearning: curves of what comes back, as JSON values and as plain text."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.distill.relearning.lessons import Lesson
from duet_unlearn.evaluation.results import STRESS_TEST_FORMAT
from duet_unlearn.evaluation.statistics import Number
from duet_unlearn.evaluation.table import Column, format_points, join_blocks, render_columns
from duet_unlearn.versions import versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a model says after some steps."""

    step: int
    recalled: Number
    """ROUGE-L recall of the queries that were not taught."""
    named: Number
    """Those that are answered with the whole reference answer."""
    retained: Number | None
    """ROUGE-L recall of retain queries; None where none are asked."""
    texts: tuple[str, ...]
    """One answer a query of the lesson's `asked`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One model, fine-tuned on one lesson at one rate."""

    model: str
    lesson: str
    learning_rate: float
    looks: tuple[Look, ...]

    @property
    def most(self) -> float:
        """The most that came back at any look, in points: whoever attacks stops where he likes."""
        return max(look.recalled.mean for look in self.looks)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelearnReport:
    """All curves of a relearning."""

    config: RelearnConfig
    lessons: tuple[Lesson, ...]
    curves: tuple[Curve, ...]

    def worst(self, model: str, lesson: str) -> Curve:
        """Return the curve of the rate that brings most back, the smallest of several."""
        curves = [c for c in self.curves if (c.model, c.lesson) == (model, lesson)]
        return max(curves, key=lambda c: (c.most, -c.learning_rate))

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers are points with count and interval."""
        return {
            "format": STRESS_TEST_FORMAT,
            "versions": versions(lora=self.config.lora_rank is not None),
            "config": self.config.to_json(),
            "lessons": [
                {
                    "name": lesson.name,
                    "source": lesson.source,
                    "taught": lesson.taught,
                    "asked": [
                        {"id": q.query_id, "kind": q.kind, "query": q.text, "answer": q.answer}
                        for q in lesson.asked
                    ],
                }
                for lesson in self.lessons
            ],
            "relearning": [
                {
                    **dataclasses.asdict(curve),
                    "worst": curve is self.worst(curve.model, curve.lesson),
                }
                for curve in self.curves
            ],
        }


def format_relearning(report: RelearnReport) -> str:
    """Return a table for each lesson: what each model says again, at its worst rate."""
    blocks = [block for lesson in report.lessons for block in _lesson_table(report, lesson)]
    notes = [
        "Mean ROUGE-L recall, in points (0-100), of forget queries that the lesson does not "
        "teach, after so many steps; of the learning rates the one that brings most back at any "
        "step counts.",
    ]
    if report.config.retain:
        notes.append("retain: the same of retain queries, after the last step at that rate.")
    return join_blocks(blocks, *notes)


def _lesson_table(report: RelearnReport, lesson: Lesson) -> list[str]:
    labels = list(report.config.labels)
    worst = [report.worst(label, lesson.name) for label in labels]
    title = f"Taught {lesson.name}: {lesson.taught} lessons, {len(lesson.asked)} queries asked"
    return render_columns(title, labels, list(_columns(report, worst)))


def _columns(report: RelearnReport, worst: list[Curve]) -> Iterator[Column]:
    for at, step in enumerate(report.config.listed_steps):
        yield f"{step} steps", [format_points(c.looks[at].recalled.mean) for c in worst]
    if report.config.retain:
        kept = [c.looks[-1].retained for c in worst]
        yield "retain", [format_points(None if k is None else k.mean) for k in kept]
    yield "worst rate", [f"{c.learning_rate:g}" for c in worst]
