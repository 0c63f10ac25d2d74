"""`duet-cache`: build, inspect and verify teacher caches."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn import __version__
from duet_unlearn.cli.cache_sets import diff_command, merge_command
from duet_unlearn.cli.cache_share import list_command, pull_command, push_command
from duet_unlearn.cli.errors import EXIT_FAILURE, DuetGroup, configure_logging

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.build import BuildResult

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=DuetGroup, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="duet-cache")
@click.option("--verbose", is_flag=True, help="Log what happens underneath, on standard error.")
def main(verbose: bool) -> None:
    """Run a prefixed teacher once and keep its Top-K logits for any number of students."""
    configure_logging(verbose=verbose)


@main.command("build")
@click.option("--teacher", required=True, metavar="MODEL", help="Model folder or hub id.")
@click.option(
    "--forget",
    multiple=True,
    metavar="FILE",
    help="Queries to forget: JSONL, CSV, Parquet or hub:NAME[:CONFIG][:SPLIT]. Repeatable.",
)
@click.option(
    "--retain", multiple=True, metavar="FILE", help="Queries to keep, same formats. Repeatable."
)
@click.option(
    "--prefix",
    required=True,
    metavar="TEXT|@NAME",
    help="The steering prefix, or a built-in one: see `duet-cache prefixes`.",
)
@click.option("--topic", metavar="TEXT", help="What to forget; fills {topic} in the prefix.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The cache folder to write."
)
@click.option(
    "--prefix-place",
    type=click.Choice(["system", "user", "raw"]),
    default="system",
    help="Where the prefix goes: system turn, front of the user turn, or in front of it all.",
)
@click.option(
    "--retain-prefix/--no-retain-prefix",
    default=True,
    help="Put the prefix in front of retain queries too.",
)
@click.option("--top-k", type=click.IntRange(min=1), default=100, help="Tokens kept a position.")
@click.option(
    "--positions", type=click.IntRange(min=1), default=1, help="Decoding steps kept a query."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default="auto",
    help="What runs the teacher; auto takes vLLM where it imports.",
)
@click.option(
    "--shard-rows", type=click.IntRange(min=1), default=1024, help="Queries in one shard."
)
@click.option(
    "--logit-dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    help="How logits are stored.",
)
@click.option(
    "--teacher-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="What the teacher computes in; auto is what its config.json names.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option(
    "--reuse",
    multiple=True,
    metavar="CACHE",
    help="Take over the rows of a cache of the same recipe. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def build_command(prefix: str, topic: str | None, as_json: bool, **settings: Any) -> None:
    """Run the teacher over all queries and write a cache.

    The same command finds a finished cache again, and goes on with a stopped one.
    """
    from duet_unlearn.data.prefixes import resolve_prefix
    from duet_unlearn.teacher_cache.build import build
    from duet_unlearn.teacher_cache.build_config import BuildConfig

    config = BuildConfig(prefix=resolve_prefix(prefix, topic), **settings)
    _print_build(config.out, build(config), as_json=as_json)


def _print_build(out: Path, result: "BuildResult", *, as_json: bool) -> None:
    manifest = result.manifest
    if as_json:
        document = {
            "cache": str(out),
            "digest": manifest.digest,
            "hit": result.hit,
            "rows": manifest.num_rows,
            "computed_rows": result.computed_rows,
            "kept_rows": result.kept_rows,
            "reused_rows": result.reused_rows,
            "shards": len(manifest.shards),
            "bytes": manifest.num_bytes,
        }
        click.echo(json.dumps(document, indent=2))
        return
    splits = ", ".join(f"{sums.rows} {split}" for split, sums in manifest.splits.items())
    done = "found finished" if result.hit else f"{result.computed_rows} queries computed"
    if result.kept_rows:
        done += f", {result.kept_rows} kept from before"
    if result.reused_rows:
        done += f", {result.reused_rows} taken from other caches"
    click.echo(f"{out}: {splits} ({done}), {manifest.num_bytes} bytes")
    click.echo(f"pin it as {out}@{manifest.digest}")


@main.command("inspect")
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect_command(cache: str, as_json: bool) -> None:
    """Show what a cache is: recipe, sizes, Top-K mass, the teacher's strongest tokens."""
    from duet_unlearn.teacher_cache.inspect import render_summary, summarize

    summary = summarize(cache)
    if as_json:
        click.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        click.echo(render_summary(summary))


@main.command("verify")
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def verify_command(ctx: click.Context, cache: str, as_json: bool) -> None:
    """Check every byte and every row; exit with 1 and name each bad shard."""
    from duet_unlearn.teacher_cache.verify import verify

    report = verify(cache)
    if as_json:
        document = {
            "cache": cache,
            "digest": report.manifest.digest,
            "sound": not report.problems,
            "rows": report.rows,
            "problems": list(report.problems),
        }
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    elif not report.problems:
        shards = len(report.manifest.shards)
        click.echo(f"{cache}: sound, {report.rows} rows in {shards} shard(s)")
    if report.problems:
        for problem in report.problems:
            click.echo(f"error: {problem}", err=True)
        ctx.exit(EXIT_FAILURE)


@main.command("prefixes")
def prefixes_command() -> None:
    """List the built-in steering prefixes."""
    from duet_unlearn.data.prefixes import CATALOGUE

    for name, template in CATALOGUE.items():
        click.echo(f"@{name}: {template.description}\n    {template.text}")


main.add_command(push_command)
main.add_command(pull_command)
main.add_command(list_command)


main.add_command(merge_command)
main.add_command(diff_command)
