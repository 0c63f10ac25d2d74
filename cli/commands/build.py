"""`duet-cache build`."""

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from duet_unlearn.cli.options import Extra, SettingsCommand, read_settings
from duet_unlearn.cli.output import json_option, print_cache
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.plan import Part

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.build.build import BuildResult


def _read_part(_ctx: click.Context, param: click.Parameter, value: str | None) -> Part | None:
    try:
        return None if value is None else Part.parse(value)
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param=param) from None


@click.command("build", cls=SettingsCommand, settings=BuildConfig)
@click.option(
    "--prefix",
    "prefix_text",
    cls=Extra,
    group="How to steer",
    metavar="TEXT|@NAME",
    help="The steering prefix, or a built-in one: see `duet-cache prefixes`.",
)
@click.option(
    "--no-prefix",
    is_flag=True,
    cls=Extra,
    group="How to steer",
    help="Take the teacher as it is: for ordinary distillation with --train and --responses.",
)
@click.option(
    "--prefix-from",
    cls=Extra,
    group="How to steer",
    metavar="FILE",
    help="Take the best prefix, its place, where it stands, its strength, views and positions from "
    "what `duet-cache tune --json` printed; flags given beside it win.",
)
@click.option(
    "--topic",
    cls=Extra,
    group="How to steer",
    metavar="TEXT",
    help="What to forget; fills {topic} in the prefix.",
)
@click.option(
    "--shards",
    "part",
    cls=Extra,
    group="Many machines",
    callback=_read_part,
    metavar="I/N",
    help="Build part I (1 to N) of the queries alone, as a small cache of its own; duet-cache "
    "merge joins all N.",
)
@json_option
@click.pass_context
def build_command(
    ctx: click.Context,
    /,
    prefix_text: str | None,
    no_prefix: bool,
    prefix_from: str | None,
    topic: str | None,
    part: Part | None,
    workers: int | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Run the teacher over all queries and write a cache.

    The same command finds a finished cache again, and resumes a stopped one.
    """
    from duet_unlearn.teacher_cache.build.build import build

    if workers is None and ctx.get_parameter_source("ray_address") is not ParameterSource.DEFAULT:
        raise click.UsageError("--ray needs --workers N: how many engines to run there")
    steering = _read_prefix(prefix_text, prefix_from, topic, no_prefix=no_prefix)
    config = read_settings(ctx, BuildConfig, part=part, **steering)
    _print_build(config, build(config), as_json=as_json)


def _read_prefix(
    prefix: str | None, prefix_from: str | None, topic: str | None, *, no_prefix: bool
) -> dict[str, Any]:
    """Return the prefix, and all that a file says of how it steers best."""
    if [prefix is None, prefix_from is None, not no_prefix].count(False) != 1:
        raise click.UsageError(
            "give one of --prefix TEXT|@NAME, --prefix-from FILE and --no-prefix"
        )
    if topic is not None and prefix is None:
        raise click.UsageError("--topic fills {topic} in --prefix; without it, leave --topic out")
    if no_prefix:
        return {"prefix": None}
    if prefix is not None:
        from duet_unlearn.data.prefixes import resolve_prefix

        return {"prefix": resolve_prefix(prefix, topic)}
    from duet_unlearn.teacher_cache.tune import load_tuned

    return load_tuned(str(prefix_from))


def _print_build(config: BuildConfig, result: "BuildResult", *, as_json: bool) -> None:
    done = f"{result.computed_rows} rows computed"
    if result.kept_rows:
        done += f", {result.kept_rows} kept from before"
    if result.reused_rows:
        done += f", {result.reused_rows} taken from other caches"
    counts = {n: getattr(result, n) for n in ("computed_rows", "kept_rows", "reused_rows")}
    print_cache(
        config.out, result.manifest, hit=result.hit, done=done, counts=counts, as_json=as_json
    )
