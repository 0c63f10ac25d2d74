"""`duet-distill report`: one page of what an evaluation found."""

import json
from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.paths import FolderPath
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.files import refuse_inside_cache, write_text


@click.command("report")
@click.argument("paths", nargs=-1, required=True, type=FolderPath(), metavar="DIR...")
@click.option(
    "--out",
    type=FolderPath(),
    metavar="FILE",
    default="report.html",
    show_default=True,
    help="The page, one HTML file that needs no network.",
)
@click.option(
    "--markdown", type=FolderPath(), metavar="FILE", help="Also write it for a model card."
)
@click.option("--json", "as_json", is_flag=True, help="Also print its content as JSON.")
@click.option(
    "--first-tokens",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Load the evaluated models and compare their strongest first tokens on N queries of each "
    "split, and on the cache's samples.  [default: what was cached]",
)
@click.option("--title", metavar="TEXT", help="Heading of the page.")
def report_command(
    paths: tuple[Path, ...],
    out: Path,
    markdown: Path | None,
    as_json: bool,
    first_tokens: int,
    title: str | None,
) -> None:
    """Show evaluations, students, relearning and caches in DIR as one HTML page.

    DIR is a folder, searched with the folders right below it, or a JSON file of `duet-distill eval
    --out`. The students that an evaluation names are found by themselves.
    """
    from duet_unlearn.evaluation.report.content import make_content
    from duet_unlearn.evaluation.report.pages import GENERATOR, render_html, render_markdown
    from duet_unlearn.evaluation.report.sources import find_sources
    from duet_unlearn.teacher_cache.inspect import summarize

    for target in (out, markdown):
        if target is not None:
            _check_target(target)
    _refuse_foreign(out, GENERATOR)
    sources = find_sources(paths, summarize)
    compared: list[dict[str, Any]] = []
    if first_tokens:
        from duet_unlearn.evaluation.report.first_tokens import compare_first_tokens

        compared = compare_first_tokens(sources, first_tokens)
    content = make_content(sources, compared, title=title)
    write_text(out, render_html(content))
    if markdown is not None:
        write_text(markdown, render_markdown(content))
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1))
    for evaluation in content["evaluations"]:
        for verdict in evaluation["verdicts"]:
            click.echo(f"{verdict['model']}: {verdict['headline']}.", err=as_json)
    click.echo(f"The page is {out}.", err=as_json)


def _check_target(target: Path) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    refuse_inside_cache(target)
    if target.is_dir():
        raise ConfigurationError(f"{target}: a folder, expected the name of a file")
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: no folder {target.parent}; make it first")


def _refuse_foreign(page: Path, generator: str) -> None:
    """Never write over a page that somebody else wrote."""
    if page.exists() and f'content="{generator}"'.encode() not in page.read_bytes()[:2000]:
        raise ConfigurationError(f"{page}: is another page; choose another --out")
