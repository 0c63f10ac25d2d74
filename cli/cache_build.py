"""`duet-cache build`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.cache_result import print_cache
from duet_unlearn.cli.paths import FolderPath

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.build.build import BuildResult
    from duet_unlearn.teacher_cache.build.plan import Part


def _read_part(_ctx: click.Context, param: click.Parameter, value: str | None) -> "Part | None":
    from duet_unlearn.errors import ConfigurationError
    from duet_unlearn.teacher_cache.build.plan import Part

    try:
        return None if value is None else Part.parse(value)
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param=param) from None


def _read_engine_args(
    _ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """Read `KEY=VALUE`s: JSON where a value is some, such as `2` and `true`, else text."""
    options: dict[str, Any] = {}
    for text in values:
        key, equals, value = text.partition("=")
        # vLLM's own command line spells its options with hyphens.
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{text!r}: expected KEY=VALUE", param=param)
        if key in options:
            raise click.BadParameter(f"{key} is given twice", param=param)
        try:
            options[key] = json.loads(value, parse_constant=str)
        except ValueError:
            options[key] = value
    return options


@click.command("build")
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
    metavar="TEXT|@NAME",
    help="The steering prefix, or a built-in one: see `duet-cache prefixes`.",
)
@click.option(
    "--prefix-from",
    metavar="FILE",
    help="Take the best prefix, its place and where it stands from what `duet-cache tune --json` "
    "printed; flags given beside it win.",
)
@click.option("--topic", metavar="TEXT", help="What to forget; fills {topic} in the prefix.")
@click.option("--out", required=True, type=FolderPath(), help="The cache folder to write.")
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
@click.option(
    "--view",
    "views",
    multiple=True,
    metavar="FILE|@NAME",
    help="Also cache what the plain base says to the retain queries in these shapes, so that a "
    "student can be trained in them: @view-shapes, or a file with one shape a line. Repeatable.",
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
@click.option(
    "--engine-arg",
    "engine_args",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_read_engine_args,
    help="An option for the engine, by its own name: tensor_parallel_size=2. Repeatable.",
)
@click.option(
    "--shards",
    "part",
    callback=_read_part,
    metavar="I/N",
    help="Build part I (1 to N) of the queries alone, as a small cache of its own; duet-cache "
    "merge joins all N.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N engines at the same time on a Ray cluster.",
)
@click.option(
    "--ray",
    "ray_address",
    metavar="ADDRESS",
    help="The Ray cluster for --workers: its address, auto, or local for this machine.  "
    "[default: local]",
    show_default=False,
)
@click.option(
    "--check/--no-check",
    default=True,
    help="First ask a sample of the queries with the prefix and without it, record what comes back "
    "of the base's answers, and warn of a teacher that does not forget or does not keep.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.pass_context
def build_command(
    ctx: click.Context,
    /,
    prefix: str | None,
    prefix_from: str | None,
    topic: str | None,
    ray_address: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run the teacher over all queries and write a cache.

    The same command finds a finished cache again, and resumes a stopped one.
    """
    from duet_unlearn.teacher_cache.build.build import build
    from duet_unlearn.teacher_cache.build.config import BuildConfig

    if ray_address is not None and settings["workers"] is None:
        raise click.UsageError("--ray needs --workers N: how many engines to run there")
    settings |= _read_prefix(ctx, prefix, prefix_from, topic)
    config = BuildConfig(ray_address=ray_address or "local", **settings)
    _print_build(config.out, build(config), as_json=as_json)


def _read_prefix(
    ctx: click.Context, prefix: str | None, prefix_from: str | None, topic: str | None
) -> dict[str, Any]:
    """Return the prefix, and of what a file says of it all that no flag does."""
    if (prefix is None) == (prefix_from is None):
        raise click.UsageError("give one of --prefix TEXT|@NAME and --prefix-from FILE")
    if prefix is not None:
        from duet_unlearn.data.prefixes import resolve_prefix

        return {"prefix": resolve_prefix(prefix, topic)}
    from duet_unlearn.teacher_cache.tune import load_tuned

    tuned = load_tuned(str(prefix_from))
    found = {
        "prefix": tuned["prefix"],
        "prefix_place": tuned["place"],
        "retain_prefix": tuned["retain_prefix"],
    }
    default = click.core.ParameterSource.DEFAULT
    return {
        name: value
        for name, value in found.items()
        if name == "prefix" or ctx.get_parameter_source(name) is default
    }


def _print_build(out: Path, result: "BuildResult", *, as_json: bool) -> None:
    counts = {
        "computed_rows": result.computed_rows,
        "kept_rows": result.kept_rows,
        "reused_rows": result.reused_rows,
    }
    print_cache(
        out, result.manifest, hit=result.hit, done=_done(result), counts=counts, as_json=as_json
    )


def _done(result: "BuildResult") -> str:
    done = f"{result.computed_rows} queries computed"
    if result.kept_rows:
        done += f", {result.kept_rows} kept from before"
    if result.reused_rows:
        done += f", {result.reused_rows} taken from other caches"
    return done
