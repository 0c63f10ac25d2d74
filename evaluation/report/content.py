"""The content of a report as JSON values: HTML and Markdown only lay it out."""

import datetime
from collections.abc import Sequence
from typing import Any

from duet_unlearn import __version__
from duet_unlearn.data.models.folder import model_name
from duet_unlearn.data.shapes import load_shapes
from duet_unlearn.errors import DataError, DuetError
from duet_unlearn.evaluation.report.sources import Sources, StudentRun, published, student_of
from duet_unlearn.evaluation.report.verdict import RECALL, index_scores, judge, not_tested

CONTENT_FORMAT = 1
"""Raised when a key of the content changes its meaning or goes away."""

_LOSSES = {"loss_forget": "forget", "loss_retain": "retain"}
_HELD_OUT = {
    "forget": "forget, worst shape",
    "forget_plain": "forget, plainly",
    "retain": "retain, worst shape",
    "retain_plain": "retain, plainly",
}


def make_content(
    sources: Sources, first_tokens: Sequence[dict[str, Any]] = (), *, title: str | None = None
) -> dict[str, Any]:
    """Return everything that a report shows.

    Args:
        sources: What was found.
        first_tokens: Computed ones, see `compare_first_tokens`; those of caches are added.
        title: Of the page.

    Raises:
        DataError: A document lacks what its format promises.
    """
    evaluations = []
    for name, document in sources.evaluations:
        try:
            evaluations.append(_evaluation(name, document, sources))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"{name}: damaged, {type(error).__name__} at {error}; write it again with "
                "`duet-distill eval --out`"
            ) from error
    try:
        students = [_student(student) for student in sources.students]
        relearnings = [_relearning(name, value) for name, value in sources.relearnings]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"a student's record or a relearning is damaged ({type(error).__name__} at {error}); "
            "leave its folder out, or make it again"
        ) from error
    return {
        "format": CONTENT_FORMAT,
        "title": title or "Did it forget?",
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "made_by": f"duet-unlearn {__version__}",
        "evaluations": evaluations,
        "first_tokens": [*first_tokens, *_cached_tokens(sources, first_tokens)],
        "relearning": relearnings,
        "students": students,
        "caches": [published(_cache(summary)) for summary in sources.caches],
    }


def _evaluation(name: str, document: dict[str, Any], sources: Sources) -> dict[str, Any]:
    labels = [row["label"] for row in document["models"]]
    numbers = index_scores(document)
    columns = [{"set": s["name"], "kind": None} for s in document["sets"]]
    columns += [
        {"set": s["name"], "kind": kind}
        for s in document["sets"]
        if s["split"] == "forget"
        for kind in s["kinds"]
    ]
    measures = document["measures"]
    return {
        "name": name,
        "verdicts": judge(document),
        "not_tested": not_tested(document, relearned=bool(sources.relearnings)),
        "labels": labels,
        "models": [_model(row, sources) for row in document["models"]],
        "columns": columns,
        "rows": [
            {
                "label": label,
                "cells": [_cell(numbers, label, None, c["set"], c["kind"]) for c in columns],
                "shift": row["performance_shift"],
                "worst_forget": row["worst_forget_recall"],
                "worst_retain": row["worst_retain_recall"],
            }
            for label, row in zip(labels, document["models"], strict=True)
        ],
        "sets": document["sets"],
        "measures": [
            {
                "measure": measure,
                "description": text,
                "rows": [
                    {
                        "label": label,
                        "cells": [
                            _cell(numbers, label, None, s["name"], None, measure)
                            for s in document["sets"]
                        ],
                    }
                    for label in labels
                ],
            }
            for measure, text in measures.items()
        ],
        "families": _families(document, sources),
        "differences": [d for d in document["differences"] if d["measure"] == RECALL],
        "prefix": document["prefix"],
        "config": published(document["config"]),
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


def _cell(
    numbers: dict[Any, dict[str, Any]],
    label: str,
    attack: str | None,
    set_name: str,
    kind: str | None,
    measure: str = RECALL,
) -> dict[str, Any] | None:
    row = numbers.get((label, attack, set_name, kind))
    if row is None or row.get(measure) is None:
        return None
    interval = row["intervals"][measure]
    return {
        "mean": row[measure],
        "low": interval["low"],
        "high": interval["high"],
        "queries": interval["queries"],
    }


def _model(row: dict[str, Any], sources: Sources) -> dict[str, Any]:
    student = None if row["prefix"] else student_of(row["model"], sources.students)
    return {
        "label": row["label"],
        "model": published(model_name(row["model"])),
        "prefix": row["prefix"],
        "trained": None if student is None else student.name,
        "seen_families": None if student is None else seen_families(student),
    }


def seen_families(student: StudentRun) -> list[str] | None:
    """Return the families of shapes that a student was trained in, None where they are unknown."""
    views = student.run.get("config", {}).get("views", [])
    try:
        shapes = [shape for source in views for shape in load_shapes(str(source))]
    except DuetError:
        return None
    return list(dict.fromkeys(shape.family for shape in shapes))


def _families(document: dict[str, Any], sources: Sources) -> list[dict[str, Any]]:
    """Return the attack matrix: a family's worst of each model, and its attacks."""
    labels = [row["label"] for row in document["models"]]
    seen = [_model(row, sources)["seen_families"] or [] for row in document["models"]]
    families: dict[str, list[dict[str, Any]]] = {}
    for attack in document["attacks"]:
        families.setdefault(attack["family"], []).append(
            {
                "name": attack["name"],
                "text": attack["text"],
                "breaks_prefix": attack["breaks_prefix"],
                "forget": [_mean(document, label, attack["name"], "forget") for label in labels],
                "retain": [_mean(document, label, attack["name"], "retain") for label in labels],
            }
        )
    return [
        {
            "family": family,
            "seen": [family in one for one in seen],
            "forget": [_extreme(attacks, "forget", at) for at in range(len(labels))],
            "retain": [_extreme(attacks, "retain", at) for at in range(len(labels))],
            "counts": any(attack["breaks_prefix"] is not False for attack in attacks),
            "attacks": attacks,
        }
        for family, attacks in families.items()
    ]


def _extreme(attacks: Sequence[dict[str, Any]], split: str, at: int) -> float | None:
    """The most that leaks, or the least that is kept, under the attacks of a family."""
    known = [attack[split][at] for attack in attacks if attack[split][at] is not None]
    return (max if split == "forget" else min)(known, default=None)


def _mean(document: dict[str, Any], label: str, attack: str, split: str) -> float | None:
    """Mean recall over all queries of a split under one attack, in points."""
    names = {s["name"] for s in document["sets"] if s["split"] == split}
    rows = [
        s
        for s in document["scores"]
        if s["model"] == label
        and s["attack"] == attack
        and s["set"] in names
        and s["kind"] is None
        and s[RECALL] is not None
    ]
    counts = [row["intervals"][RECALL]["queries"] for row in rows]
    total = sum(float(row[RECALL]) * count for row, count in zip(rows, counts, strict=True))
    return total / sum(counts) if sum(counts) else None


def _student(student: StudentRun) -> dict[str, Any]:
    run = student.run
    charts = []
    losses = {
        name: [[entry["step"], entry[key]] for entry in student.log if key in entry]
        for key, name in _LOSSES.items()
    }
    if any(losses.values()):
        charts.append({"title": "Loss", "x": "step", "y": "loss", "log": True, "series": losses})
    held_out = run["result"]["evaluations"]
    if held_out:
        curves = {name: [[e["step"], e[key]] for e in held_out] for key, name in _HELD_OUT.items()}
        charts.append(
            {"title": "Held out", "x": "step", "y": "recall", "log": False, "series": curves}
        )
    config, result = published(run["config"]), run["result"]
    facts = {
        "base": f"{run['base']['name']}, {run['base']['weights']}",
        "cache": run["cache"]["digest"],
        "recipe": run["cache"]["recipe_id"],
        "views": run["views"],
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
        "config": config,
        "versions": run["versions"],
    }


def _relearning(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Curves of what comes back against steps, a chart for each thing that was taught."""
    charts = []
    for lesson in dict.fromkeys(curve["lesson"] for curve in value["relearning"]):
        series = {
            f"{curve['model']}, {curve['learning_rate']:g}": [
                [look["step"], look["recalled"]["mean"]] for look in curve["looks"]
            ]
            for curve in value["relearning"]
            if curve["lesson"] == lesson
        }
        charts.append(
            {
                "title": f"Trained on {lesson}",
                "x": "step",
                "y": "facts not taught, points",
                "log": False,
                "series": series,
            }
        )
    return {
        "name": name,
        "charts": charts,
        "config": published(value.get("config", {})),
        "curves": value["relearning"],
    }


def _cache(summary: dict[str, Any]) -> dict[str, Any]:
    """What identifies a cache, without its samples."""
    return {key: value for key, value in summary.items() if key != "samples"}


def _cached_tokens(sources: Sources, computed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the teacher's strongest tokens of caches' samples that nothing was computed for."""
    done = {found["query"] for found in computed}
    return [
        cached_sample(sample)
        for summary in sources.caches
        for sample in summary["samples"]
        if sample["query"] not in done
    ]


def cached_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a cache's sample as one query's first tokens, with the teacher's column."""
    return {
        "query": sample["query"],
        "split": sample["split"],
        "columns": [{"label": "teacher, as cached", "tokens": sample["strongest"]}],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
