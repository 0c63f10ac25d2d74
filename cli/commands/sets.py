"""`duet-cache merge` and `duet-cache diff`: commands on several caches."""

from pathlib import Path

import click

from duet_unlearn.cli.errors import Failure
from duet_unlearn.cli.options import FolderPath
from duet_unlearn.cli.output import json_option, print_cache, print_json
from duet_unlearn.errors import DuetError

_DIFFERENT = 1


class _Trouble(Failure):
    """As diff has it: 1 says that two caches differ, so that a failure is 2."""

    exit_code = 2


@click.command("merge")
@click.argument("caches", nargs=-1, required=True, metavar="CACHE...")
@click.option("--out", required=True, type=FolderPath(), help="The cache folder to write.")
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    default=1024,
    help="Queries in one shard.",
)
@json_option
def merge_command(caches: tuple[str, ...], out: Path, shard_rows: int, as_json: bool) -> None:
    """Join caches of one recipe into one; no teacher runs.

    A query that several caches have is kept once, as the first of them has it. Caches of different
    recipes are refused with what differs. The same command resumes a stopped merge.
    """
    from duet_unlearn.teacher_cache.merge import merge

    result = merge(caches, out, shard_rows=shard_rows)
    done = f"{len(caches)} caches joined"
    if result.repeated_rows:
        done += f", {result.repeated_rows} repeated queries left out"
    counts = {n: getattr(result, n) for n in ("repeated_rows", "differing_rows", "renamed_rows")}
    print_cache(out, result.manifest, hit=result.hit, done=done, counts=counts, as_json=as_json)


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@json_option
@click.pass_context
def diff_command(ctx: click.Context, a: str, b: str, as_json: bool) -> None:
    """Show what differs between the recipes and the queries of two caches.

    Signals are not compared. Exits like diff: 0 where recipes and queries are the same, 1 where
    they differ, 2 where a cache cannot be read.
    """
    from duet_unlearn.teacher_cache.diff import diff, render_difference

    try:
        difference = diff(a, b)
    except (DuetError, OSError) as error:
        raise _Trouble(str(error)) from error
    if as_json:
        print_json(difference)
    else:
        click.echo(render_difference(difference))
    if not difference["same"]:
        ctx.exit(_DIFFERENT)
