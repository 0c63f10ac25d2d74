"""`duet-distill report`: one page of what an evaluation found."""

from pathlib import Path

import click

from duet_unlearn.cli.errors import harmless
from duet_unlearn.cli.options import FolderPath
from duet_unlearn.cli.output import check_target, json_option, print_json, write_target
from duet_unlearn.errors import ConfigurationError


@click.command("report")
@click.argument("paths", nargs=-1, required=True, type=FolderPath(), metavar="DIR...")
@click.option(
    "--out",
    type=FolderPath(),
    metavar="FILE",
    default="report.html",
    help="The page, one HTML file that needs no network.",
)
@click.option(
    "--markdown", type=FolderPath(), metavar="FILE", help="Also write it for a model card."
)
@click.option(
    "--first-tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=False,
    metavar="N",
    help="Load the evaluated models and compare their strongest first tokens on N queries of each "
    "split, and on the cache's samples.  [default: what was cached]",
)
@click.option("--title", metavar="TEXT", help="Heading of the page.")
@json_option
def report_command(
    paths: tuple[Path, ...],
    out: Path,
    markdown: Path | None,
    first_tokens: int,
    title: str | None,
    as_json: bool,
) -> None:
    """Show evaluations, students, relearning and caches in DIR as one HTML page.

    DIR is a folder, searched with the folders right below it, or a JSON file of `duet-distill eval
    --out`. The students that an evaluation names are found by themselves.
    """
    from duet_unlearn.evaluation.report.content import make_content
    from duet_unlearn.evaluation.report.first_tokens import compare_first_tokens
    from duet_unlearn.evaluation.report.pages import GENERATOR, render_html, render_markdown
    from duet_unlearn.evaluation.report.sources import find_sources
    from duet_unlearn.teacher_cache.inspect import summarize

    check_target(out, f'content="{GENERATOR}"')
    if markdown is not None:
        if markdown.resolve() == out.resolve():
            raise ConfigurationError(
                f"--markdown {markdown}: the page goes there; name another file"
            )
        check_target(markdown, "\nduet-unlearn ")  # its last line
    sources = find_sources(paths, summarize)
    compared = compare_first_tokens(sources, first_tokens) if first_tokens else []
    content = make_content(sources, compared, title=title)
    write_target(out, render_html(content))
    if markdown is not None:
        write_target(markdown, render_markdown(content))
    if as_json:
        print_json(content)
    for evaluation in content["evaluations"]:
        for verdict in evaluation["verdicts"]:
            click.echo(harmless(f"{verdict['model']}: {verdict['headline']}."), err=as_json)
    click.echo(f"The page is {out}.", err=as_json)
