"""A report's content as one HTML file that needs no network, and as Markdown."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from duet_unlearn.evaluation.report.charts import SERIES_STYLES, line_chart
from duet_unlearn.evaluation.report.verdict import points

GENERATOR = "duet-distill report"
"""In the page's head: a file that says so may be written anew."""


def render_html(content: dict[str, Any]) -> str:
    """Return the page: style, script and data within, every foreign text escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = points
    environment.globals.update(line_chart=line_chart, styles=SERIES_STYLES, generator=GENERATOR)
    page = environment.get_template("page.html.jinja").render(**content)
    # JSON may hold halves of surrogate pairs, which no UTF-8 file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def render_markdown(content: dict[str, Any]) -> str:
    """Return what fits a model card: verdicts, tables, first tokens, provenance; no answers."""
    lines = [f"# {_plain(content['title'])}", ""]
    for evaluation in content["evaluations"]:
        lines += [*_markdown_evaluation(evaluation), ""]
    for found in content["first_tokens"]:
        lines += ["", f"### First tokens: {_plain(found['query'])} ({found['split']})", ""]
        columns = [
            [f"{t['text']!r} {t['logit']:.2f}" for t in column["tokens"]]
            for column in found["columns"]
        ]
        height = max(map(len, columns))
        padded = [column + [""] * (height - len(column)) for column in columns]
        headings = [column["label"] for column in found["columns"]]
        lines += _table(["rank", *headings], zip(range(1, height + 1), *padded, strict=True))
    for relearning in content["relearning"]:
        lines += ["", f"## What fine-tuning brings back: {_plain(relearning['name'])}", ""]
        headings = ["model", "trained on", "learning rate", "points of facts not taught, by step"]
        rows = [
            (
                curve["model"],
                curve["lesson"],
                f"{curve['learning_rate']:g}",
                ", ".join(f"{k['step']}: {points(k['recalled']['mean'])}" for k in curve["looks"]),
            )
            for curve in relearning["curves"]
        ]
        lines += _table(headings, rows)
    for student in content["students"]:
        lines += ["", f"## Student {_plain(student['name'])}", ""]
        lines += _table(["", ""], student["facts"].items())
    for cache in content["caches"]:
        lines += ["", f"## Teacher cache `{_plain(cache['digest'])}`", ""]
        recipe = cache["recipe"]
        lines += _table(["recipe", cache["recipe_id"]], recipe.items())
    lines += ["", f"{_plain(content['made_by'])}, {content['made']}"]
    text = "\n".join(lines) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")


def _markdown_evaluation(evaluation: dict[str, Any]) -> Iterator[str]:
    for verdict in evaluation["verdicts"]:
        yield f"**{_plain(verdict['model'])}: {_plain(verdict['headline'])}.** " + _plain(
            verdict["text"]
        )
        yield ""
    if evaluation["not_tested"]:
        yield from (evaluation["not_tested"], "")
    yield from ("ROUGE-L recall in points, with 95% intervals:", "")
    headings = [column["kind"] or column["set"] for column in evaluation["columns"]]
    yield from _table(
        ["", *headings, "worst attack: forget", "retain"],
        [
            (
                row["label"],
                *map(_cell, row["cells"]),
                points(row["worst_forget"]),
                points(row["worst_retain"]),
            )
            for row in evaluation["rows"]
        ],
    )
    if evaluation["families"]:
        yield from ("", "Forget recall under the worst attack of each family:", "")
        yield from _table(
            ["family", *evaluation["labels"]],
            [
                (
                    family["family"] + ("" if family["counts"] else " *"),
                    *[
                        points(value) + (" (seen)" if seen else "")
                        for value, seen in zip(family["forget"], family["seen"], strict=True)
                    ],
                )
                for family in evaluation["families"]
            ],
        )
        yield from ("", "seen: the student was trained in shapes of that family. *: does not break")
        yield "the steering prefix, so that little follows."


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return points(None)
    return f"{points(cell['mean'])} ({points(cell['low'])} to {points(cell['high'])})"


def _table(headings: Sequence[object], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(_plain(h) for h in headings)} |"
    yield "|" + " --- |" * len(headings)
    for row in rows:
        yield f"| {' | '.join(_plain(value) for value in row)} |"


def _plain(value: object) -> str:
    """One line that Markdown takes for text: nothing of it opens a table cell, a link or a tag."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
