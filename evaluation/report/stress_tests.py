"""The content of a report's sections on stress tests as JSON values."""

from typing import Any

from duet_unlearn.evaluation.report.charts import make_chart
from duet_unlearn.evaluation.report.sources import Document, Sources
from duet_unlearn.urls import published_value


def describe_stress_tests(sources: Sources) -> Document:
    """Return what a report shows of each kind, nothing where there is none."""
    return {
        key: [
            {
                "name": name,
                **describe(value),
                "config": published_value(value.get("config", {})),
            }
            for name, value in sources.stress_tests.get(key, [])
        ]
        for key, describe in _KINDS.items()
    }


def _relearning(value: Document) -> Document:
    """Curves of what comes back against steps, for each thing that was taught.

    A model has one curve there, of the rate that brings most back; the table has all.
    """
    charts: dict[str, Document] = {}
    for curve in value["relearning"]:
        if not curve.get("worst", True):
            continue
        label = f"{curve['model']}, {curve['learning_rate']:g}"
        for key, title, y in (
            ("recalled", "Trained on {}", "facts not taught, points"),
            ("retained", "Trained on {}, kept meanwhile", "retain, points"),
        ):
            title = title.format(curve["lesson"])
            chart = charts.setdefault(title, make_chart(title, y, {}))
            points = [[look["step"], (look.get(key) or {}).get("mean")] for look in curve["looks"]]
            chart["series"][label] = points
    return {
        "charts": [chart for chart in charts.values() if _has_points(chart)],
        "curves": [
            {
                **{key: curve[key] for key in ("model", "lesson", "learning_rate")},
                "worst": curve.get("worst", True),
                "looks": [
                    {key: look.get(key) for key in ("step", "recalled", "named", "retained")}
                    for look in curve["looks"]
                ],
            }
            for curve in value["relearning"]
        ],
    }


def _membership(value: Document) -> Document:
    """Return the AUC of each model and score."""
    found = {(row["model"], row["score"]): row for row in value["membership"]}
    models = dict.fromkeys(model for model, _ in found)
    first = next(iter(found.values()))
    return {
        "scores": [{"score": key, "description": text} for key, text in value["scores"].items()],
        "rows": [
            {
                "label": model,
                "cells": [
                    {key: found[model, score][key] for key in ("auc", "low", "high")}
                    for score in value["scores"]
                ],
            }
            for model in models
        ],
        "forget": first["count"],
        "holdout": first["against"],
    }


def _attacking(value: Document) -> Document:
    """Return a row a model, with what it says plainly and behind each attack."""
    found = {(row["model"], row["attack"]): row for row in value["attacking"]}
    attacks = list(dict.fromkeys(attack for _, attack in found))
    models = dict.fromkeys(model for model, _ in found)
    retained = any(row["retained"] for row in found.values())
    columns = [
        {"split": split, "key": key, "attack": attack}
        for split, key in (("forget", "recalled"), ("retain", "retained"))
        for attack in attacks
        if key == "recalled" or retained
    ]
    return {
        "columns": columns,
        "rows": [
            {"label": model, "cells": [found[model, c["attack"]][c["key"]] for c in columns]}
            for model in models
        ],
        "suffixes": [
            [f"suffix found for {row['model']}", row["suffix"]]
            for row in found.values()
            if row["suffix"] is not None
        ],
        "trained": value["trained"],
    }


def _probing(value: Document) -> Document:
    """Return curves over the layers, and all numbers."""
    rows = value["probing"]

    def curves(of: str) -> dict[str, list[Any]]:
        series: dict[str, list[Any]] = {}
        for row in rows:
            y = row[of]["mean"] if isinstance(row[of], dict) else row[of]
            series.setdefault(row["model"], []).append([row["layer"], y])
        return series

    return {
        "charts": [
            make_chart(
                "Logit lens", "median rank of the answer", curves("rank"), x="layer", log=True
            ),
            make_chart("Linear probe, forget", "pairs, points", curves("told_apart"), x="layer"),
            make_chart(
                "Linear probe, retain", "pairs, points", curves("retain_told_apart"), x="layer"
            ),
        ],
        "rows": [
            {
                "label": row["model"],
                "layer": row["layer"],
                "rank": row["rank"],
                "cells": [row["probability"], row["told_apart"], row["retain_told_apart"]],
                "shuffled": row["shuffled"],
            }
            for row in rows
        ],
        "pairs": value["pairs"],
    }


def _has_points(chart: Document) -> bool:
    return any(y is not None for points in chart["series"].values() for _, y in points)


_KINDS = {
    "relearning": _relearning,
    "attacking": _attacking,
    "probing": _probing,
    "membership": _membership,
}
