"""The content of a report as JSON values: HTML and Markdown only lay it out."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from duet_unlearn import __version__
from duet_unlearn.data.models.folder import model_name
from duet_unlearn.data.shapes import QUERY_SLOT
from duet_unlearn.evaluation.measures import RECALL
from duet_unlearn.evaluation.report.charts import make_chart
from duet_unlearn.evaluation.report.overview import make_overview, model_path
from duet_unlearn.evaluation.report.sources import Document, Sources, StudentRun, reading
from duet_unlearn.evaluation.report.stress_tests import describe_stress_tests
from duet_unlearn.evaluation.report.verdict import Numbers, index_scores, judge, not_tested
from duet_unlearn.urls import published_name, published_value

CONTENT_FORMAT = 1
"""Raised when a key of the content changes its meaning or goes away."""

_LOSSES = {"loss_forget": "forget", "loss_retain": "retain"}
_HELD_OUT = {
    "forget": "forget, worst shape",
    "forget_plain": "forget, plainly",
    "retain": "retain, worst shape",
    "retain_plain": "retain, plainly",
}
_HELD_OUT_LOSSES = {"loss": "loss", "cross_entropy": "cross-entropy"}


def make_content(
    sources: Sources, first_tokens: Sequence[Document] = (), *, title: str | None = None
) -> Document:
    """Return everything that a report shows.

    Args:
        sources: What was found.
        first_tokens: Computed ones, see `compare_first_tokens`; those of caches are added.
        title: Of the page.

    Raises:
        DataError: A document lacks what its format promises.
    """
    students = []
    for student in sources.students:
        with reading(f"{student.folder}: its record", "leave the folder out, or train it again"):
            students.append(_student(student))
    with reading("a stress test's record", "leave its folder out, or make it again"):
        stress_tests = describe_stress_tests(sources)
    evaluations = []
    for name, document in sources.evaluations:
        with reading(name, "write it again with `duet-distill eval --out`"):
            evaluations.append(_evaluation(name, document, sources))
    _judge_once(evaluations, [document for _, document in sources.evaluations])
    computed = {found["query"] for found in first_tokens}
    cached = [cached_sample(s) for c in sources.caches for s in c["samples"]]
    return {
        "format": CONTENT_FORMAT,
        "title": title or "Did it forget?",
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "made_by": f"duet-unlearn {__version__}",
        "evaluations": evaluations,
        "first_tokens": [*first_tokens, *(c for c in cached if c["query"] not in computed)],
        **stress_tests,
        "students": students,
        "caches": [
            published_value({key: value for key, value in summary.items() if key != "samples"})
            for summary in sources.caches
        ],
    }


def _judge_once(evaluations: Sequence[Document], documents: Sequence[Document]) -> None:
    """Leave out verdicts without attacks on models that an earlier evaluation judged."""
    judged: list[Any] = []
    for evaluation, document in zip(evaluations, documents, strict=True):
        sets = [(s["name"], s["queries"]) for s in document["sets"]]
        whole = {
            row["label"]: (model_path(row), sets)
            for row in document["models"]
            if not row.get("quantized")
        }
        if not document["attacks"]:
            evaluation["verdicts"] = [
                verdict
                for verdict in evaluation["verdicts"]
                if whole.get(verdict["model"]) not in judged
            ]
        judged += whole.values()


def cached_sample(sample: Document) -> Document:
    """Return a cache's sample as one query's first tokens, with the teacher's column."""
    return {
        "query": sample["query"],
        "split": sample["split"],
        "columns": [{"label": "teacher, as cached", "tokens": sample["strongest"]}],
    }


def _evaluation(name: str, document: Document, sources: Sources) -> Document:
    rows = document["models"]
    sets = [{**s, "source": published_value(s["source"])} for s in document["sets"]]
    labels = [row["label"] for row in rows]
    numbers = index_scores(document)
    columns = [{"set": s["name"], "kind": None} for s in sets]
    columns += [
        {"set": s["name"], "kind": k} for s in sets if s["split"] == "forget" for k in s["kinds"]
    ]
    models = [_model(row, sources) for row in rows]
    overview = make_overview(document, sources)

    def cells(label: str, measure: str, columns: Sequence[Document]) -> list[Document | None]:
        return [_cell(numbers.get((label, None, c["set"], c["kind"])), measure) for c in columns]

    return {
        "name": name,
        "verdicts": judge(document, overview),
        "overview": overview,
        "not_tested": not_tested(
            document,
            stress_tests=sources.stress_tests,
            others=[other for _, other in sources.evaluations],
        ),
        "labels": labels,
        "models": models,
        "columns": columns,
        "rows": [
            {
                "label": row["label"],
                "cells": cells(row["label"], RECALL, columns),
                "shift": row["performance_shift"],
                "worst_forget": row["worst_forget_recall"],
                "worst_retain": row["worst_retain_recall"],
            }
            for row in rows
        ],
        "sets": sets,
        "measures": [
            {
                "measure": measure,
                "description": text,
                "rows": [
                    {"label": label, "cells": cells(label, measure, columns[: len(sets)])}
                    for label in labels
                ],
            }
            for measure, text in document["measures"].items()
        ],
        "families": _families(document, numbers, models),
        "differences": [d for d in document["differences"] if d["measure"] == RECALL],
        "prefix": document["prefix"],
        "config": published_value(document["config"]),
        "versions": document["versions"],
        "answers": [
            {
                **{key: q[key] for key in ("set", "id", "kind", "attack", "query", "answer")},
                "texts": [q["responses"][label]["text"] for label in labels],
                "recalls": [_rounded(q["responses"][label].get(RECALL)) for label in labels],
            }
            for q in document["queries"]
        ],
    }


def _cell(row: Document | None, measure: str) -> Document | None:
    """A mean with its interval and count, None where nothing was measured."""
    if row is None or row.get(measure) is None:
        return None
    return {"mean": row[measure], **row["intervals"][measure]}


def _model(row: Document, sources: Sources) -> Document:
    student = None if row["prefix"] else sources.student(row["model"])
    return {
        "label": row["label"],
        "model": published_value(model_name(row["model"])),
        "prefix": row["prefix"],
        "trained": None if student is None else student.name,
        "seen_families": None if student is None else seen_families(student),
    }


def seen_families(student: StudentRun) -> list[str] | None:
    """Return the families of shapes that a student was trained in, None where they are unknown."""
    families = student.run.get("view_families")
    return list(map(str, families)) if isinstance(families, list) else None


def _families(document: Document, numbers: Numbers, models: Sequence[Document]) -> list[Document]:
    """Return the attack matrix: a family's worst of each model, and its attacks."""
    names: dict[str, list[str]] = {"forget": [], "retain": []}
    for s in document["sets"]:
        names.setdefault(s["split"], []).append(s["name"])

    def means(attack: str, split: str) -> list[float | None]:
        return [
            _mean([numbers.get((m["label"], attack, name, None)) for name in names[split]])
            for m in models
        ]

    families: dict[str, list[Document]] = {}
    for attack in document["attacks"]:
        families.setdefault(attack["family"], []).append(
            {
                **{key: attack[key] for key in ("name", "breaks_prefix")},
                "text": _shown_text(attack["text"]),
                **{split: means(attack["name"], split) for split in ("forget", "retain")},
            }
        )
    columns = range(len(models))
    return [
        {
            "family": family,
            "seen": [family in (m["seen_families"] or []) for m in models],
            # The most that leaks, and the least that is kept.
            "forget": [_extreme(max, [a["forget"][at] for a in attacks]) for at in columns],
            "retain": [_extreme(min, [a["retain"][at] for a in attacks]) for at in columns],
            "counts": any(a["breaks_prefix"] is not False for a in attacks),
            "attacks": attacks,
        }
        for family, attacks in families.items()
    ]


def _shown_text(text: str) -> str:
    # That of a file of wordings is where the file lies.
    return text if QUERY_SLOT in text else published_name(text)


def _extreme(pick: Any, values: Sequence[float | None]) -> float | None:
    found: float | None = pick((v for v in values if v is not None), default=None)
    return found


def _mean(rows: Sequence[Document | None]) -> float | None:
    """Return the mean recall over all queries of several sets, in points."""
    cells = [cell for row in rows if (cell := _cell(row, RECALL))]
    count = sum(cell["queries"] for cell in cells)
    return sum(float(c["mean"]) * c["queries"] for c in cells) / count if count else None


def _student(student: StudentRun) -> Document:
    run, result = student.run, student.run["result"]
    losses = _curves(student.log, _LOSSES)
    charts = [make_chart("Loss", "loss", losses, log=True)] if any(losses.values()) else []
    if result["evaluations"]:
        by_loss = "loss" in result["evaluations"][0]
        curves = _curves(result["evaluations"], _HELD_OUT_LOSSES if by_loss else _HELD_OUT)
        charts.append(make_chart("Held out", "loss" if by_loss else "recall", curves, log=by_loss))
    facts = {
        "base": f"{run['base']['name']}, {run['base']['weights']}",
        **_source(run),
        "queries": ", ".join(f"{count} {split}" for split, count in result["queries"].items()),
        "trained": f"{result['trained']}, {result['trained_parameters']:,} numbers",
        "steps": f"{result['steps']}, step {result['kept_step']} kept",
        "learning rate": f"{result['learning_rate']:.3g}",
        "seconds": f"{result['seconds']:.0f}",
    }
    return {
        "name": student.name,
        "facts": facts,
        "charts": charts,
        "config": published_value(run["config"]),
        "versions": run["versions"],
    }


def _source(run: Document) -> Document:
    """Return what a student was trained from: a cache and views, or answers."""
    if "cache" not in run:
        return {"answers": run["answers"]}
    cache = run["cache"]
    return {"cache": cache["digest"], "recipe": cache["recipe_id"], "views": run["views"]}


def _curves(entries: Sequence[Document], keys: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return points `[step, value]` of each key, under the name that it is shown by."""
    return {
        name: [[entry["step"], entry[key]] for entry in entries if key in entry]
        for key, name in keys.items()
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
