"""A report's content as one HTML file that needs no network, and as Markdown for a model card."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from duet_unlearn.evaluation.report.charts import SERIES_STYLES, lay_out
from duet_unlearn.evaluation.report.verdict import points

GENERATOR = "duet-distill report"
"""In the page's head: a file that says so may be written anew."""


def render_html(content: dict[str, Any]) -> str:
    """Return the page: style, script and data within, every foreign text escaped."""
    return _render("page.html.jinja", content, autoescape=True)


def render_markdown(content: dict[str, Any]) -> str:
    """Return verdicts, tables, first tokens and provenance; no answers."""
    return _render("page.md.jinja", content, finalize=_plain)


def _render(template: str, content: dict[str, Any], **settings: Any) -> str:
    environment = Environment(  # noqa: S701 - Markdown is escaped by _plain
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **settings,
    )
    environment.filters["points"] = points
    environment.globals.update(lay_out=lay_out, styles=SERIES_STYLES, generator=GENERATOR)
    page = environment.get_template(template).render(**content)
    # JSON may hold halves of surrogate pairs, which no UTF-8 file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def _plain(value: object) -> str:
    """One line that Markdown takes for text: nothing of it opens a table cell, a link or a tag."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
