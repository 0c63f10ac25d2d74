"""`duet-cache`: build, inspect and verify teacher caches."""

import click

from duet_unlearn import __version__
from duet_unlearn.cli.commands.build import build_command
from duet_unlearn.cli.commands.sets import diff_command, merge_command
from duet_unlearn.cli.commands.share import list_command, pull_command, push_command
from duet_unlearn.cli.commands.tune import tune_command
from duet_unlearn.cli.errors import EXIT_FAILURE, DuetGroup, configure_logging, harmless
from duet_unlearn.cli.output import json_option, print_json
from duet_unlearn.urls import redact_url

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=DuetGroup, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="duet-cache")
@click.option("--verbose", is_flag=True, help="Log what happens underneath, on standard error.")
def main(verbose: bool) -> None:
    """Run a prefixed teacher once and keep its Top-K logits for any number of students."""
    configure_logging(verbose=verbose)


@main.command("inspect")
@click.argument("cache")
@json_option
def inspect_command(cache: str, as_json: bool) -> None:
    """Show what a cache is: recipe, sizes, Top-K mass, the teacher's strongest tokens."""
    from duet_unlearn.teacher_cache.inspect import render_summary, summarize

    summary = summarize(cache)
    if as_json:
        print_json(summary)
    else:
        click.echo(render_summary(summary))


@main.command("verify")
@click.argument("cache")
@json_option
@click.pass_context
def verify_command(ctx: click.Context, cache: str, as_json: bool) -> None:
    """Check every byte and every row; exit with 1 and name each bad shard."""
    from duet_unlearn.teacher_cache.verify import verify

    report = verify(cache)
    if as_json:
        document = {
            "cache": redact_url(cache),
            "digest": report.manifest.digest,
            "sound": not report.problems,
            "rows": report.rows,
            "problems": list(report.problems),
        }
        print_json(document)
    elif not report.problems:
        shards = len(report.manifest.shards)
        click.echo(f"{redact_url(cache)}: sound, {report.rows} rows in {shards} shard(s)")
    if report.problems:
        for problem in report.problems:
            click.echo(f"error: {harmless(problem)}", err=True)
        ctx.exit(EXIT_FAILURE)


@main.command("prefixes")
def prefixes_command() -> None:
    """List the built-in steering prefixes."""
    from duet_unlearn.data.prefixes import CATALOGUE

    for name, template in CATALOGUE.items():
        click.echo(f"@{name}: {template.description}\n    {template.text}")


main.add_command(tune_command)
main.add_command(build_command)
main.add_command(push_command)
main.add_command(pull_command)
main.add_command(list_command)
main.add_command(merge_command)
main.add_command(diff_command)

if __name__ == "__main__":  # python -m duet_unlearn.cli.cache
    main(prog_name="duet-cache")
