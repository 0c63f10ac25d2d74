"""Every test at a glance: what each found of a model, found again by the model's path."""

import os
from collections.abc import Iterator

from duet_unlearn.evaluation.measures import RECALL
from duet_unlearn.evaluation.report.sources import Document, Sources

SEARCHED = "searched attack"
TAUGHT = "fine-tuned on "
_AUC = "loss"
"""Of the membership scores, the one that needs no setting."""

Key = tuple[str, bool]
"""A model's path, and whether it stands behind the prefix."""


def make_overview(document: Document, sources: Sources) -> Document:
    """Return the most that each kind of test draws out of each model of an evaluation.

    Recall of forget queries in points, each test's own queries; `membership` is an AUC. A test that
    was not made has no column.
    """
    found: dict[str, dict[Key, float]] = {}
    _most(found, _asked(document))
    for _, other in sources.evaluations:
        _most(found, _rounded(other))
    for _, test in sources.stress_tests.get("attacking", []):
        _most(found, _searched(test))
    for _, test in sources.stress_tests.get("relearning", []):
        _most(found, _relearned(test))
    membership: dict[Key, float] = {}
    for _, test in sources.stress_tests.get("membership", []):
        paths = _paths(test)
        for row in test["membership"]:
            if row["score"] == _AUC and row["model"] in paths:
                membership[paths[row["model"]]] = row["auc"]
    return {
        "columns": list(found),
        "rows": [
            {
                "label": row["label"],
                "cells": [column.get(_key(row)) for column in found.values()],
                "membership": membership.get(_key(row)),
            }
            for row in document["models"]
            if not row.get("quantized")
        ],
        "membership": bool(membership),
    }


Found = Iterator[tuple[str, Key, float | None]]
"""Column, model, points."""


def _most(found: dict[str, dict[Key, float]], numbers: Found) -> None:
    for column, key, value in numbers:
        if value is not None:
            cells = found.setdefault(column, {})
            cells[key] = max(cells.get(key, 0.0), value)


def _asked(document: Document) -> Found:
    whole = [row for row in document["models"] if not row.get("quantized")]
    plain = [(_key(row), score) for row in whole for score in _plain_scores(document, row)]
    for key, score in plain:
        yield "asked plainly", key, score[RECALL]
    samples = document["config"].get("samples")
    for key, score in plain:
        yield f"best of {samples} samples", key, score.get("sampled_recall")
    for row in whole:
        yield "worst attack", _key(row), row["worst_forget_recall"]


def _rounded(document: Document) -> Found:
    for row in document["models"]:
        if row.get("quantized"):
            for score in _plain_scores(document, row):
                yield row["quantized"], _key(row), score[RECALL]


def _plain_scores(document: Document, row: Document) -> list[Document]:
    """Return a row's scores on each forget set, asked as it stands."""
    names = [s["name"] for s in document["sets"] if s["split"] == "forget"]
    asked = {(row["label"], name, None, None) for name in names}
    return [
        s for s in document["scores"] if (s["model"], s["set"], s["attack"], s["kind"]) in asked
    ]


def _searched(document: Document) -> Found:
    keys = _paths(document)
    for row in document["attacking"]:
        if row["model"] in keys and row["attack"] != "none":
            yield SEARCHED, keys[row["model"]], row["recalled"]["mean"]


def _relearned(document: Document) -> Found:
    keys = _paths(document)
    for curve in document["relearning"]:
        for look in curve["looks"]:
            if curve["model"] in keys and look["step"]:
                mean = (look.get("recalled") or {}).get("mean")
                yield f"{TAUGHT}{curve['lesson']}", keys[curve["model"]], mean


def _paths(document: Document) -> dict[str, Key]:
    """Return the models of a stress test by their rows' labels; the first has one with prefix."""
    config = document.get("config", {})
    models = config.get("models", [])
    found = {spec["label"]: (model_path(spec), False) for spec in models}
    if models and config.get("prefix"):
        found[f"{models[0]['label']} + prefix"] = (model_path(models[0]), True)
    return found


def _key(row: Document) -> Key:
    return model_path(row), bool(row["prefix"])


def model_path(model: Document) -> str:
    """Return what tells a model in any document; a document names one by folder or hub id."""
    return os.path.realpath(str(model["model"]))
