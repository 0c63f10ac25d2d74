"""`duet-distill eval`: compare what models still answer."""

import json
from pathlib import Path
from typing import Any

import click

from duet_unlearn.data.models.loading import DTYPES
from duet_unlearn.errors import CacheError, ConfigurationError, StoppedError
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec

_DEFAULTS = {name: field.default for name, field in EvalConfig.__dataclass_fields__.items()}


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--forget",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Queries with answers that should be gone; a column `kind` is scored apart. Repeatable.",
)
@click.option(
    "--retain",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Queries with answers that should be kept. Repeatable.",
)
@click.option(
    "--general",
    multiple=True,
    metavar="FILE",
    help="Queries with answers on anything else. Repeatable.",
)
@click.option(
    "--prefix",
    metavar="TEXT|@NAME",
    help="Steering prefix: adds a row for the first MODEL with it.",
)
@click.option("--topic", metavar="TEXT", help="What fills {topic} in the prefix.")
@click.option(
    "--prefix-place",
    type=click.Choice(["system", "user", "raw"]),
    default=_DEFAULTS["prefix_place"],
    help="Where the prefix stands.",
    show_default=True,
)
@click.option(
    "--attacks",
    multiple=True,
    metavar="FILE|@NAME",
    help="Also ask forget and retain queries behind each of these wrappers: a text file, one a "
    "line with {query} in it, one built-in name, or @attacks, @views, @all. Repeatable.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=_DEFAULTS["batch_size"],
    help="Most queries of a forward pass.",
    show_default=True,
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=_DEFAULTS["max_new_tokens"],
    help="Longest answer in tokens.",
    show_default=True,
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=_DEFAULTS["dtype"],
    help="Arithmetic; auto is as stored where the processor has that fast, else float32.",
    show_default=True,
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Take this many queries of each file, evenly spread.  [default: all]",
)
@click.option(
    "--json",
    "json_out",
    metavar="OUT",
    help="Also write everything, each response too, to this JSON file; - prints it instead of "
    "the table, which then goes to standard error.",
)
def eval_command(models: tuple[str, ...], json_out: str | None, **settings: Any) -> None:
    """Answer queries with each MODEL and score the answers, side by side.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL to name its row; the
    first one is the reference.
    """
    config = EvalConfig(models=tuple(ModelSpec.parse(text) for text in models), **settings)
    target = None if json_out in (None, "-") else Path(str(json_out)).expanduser()
    if target is not None:
        _check_target(target)
    try:
        from duet_unlearn.evaluation.evaluate import evaluate
        from duet_unlearn.evaluation.table import format_report

        report = evaluate(config)
    except KeyboardInterrupt as error:
        raise StoppedError("stopped; an evaluation keeps no parts, so start it again") from error
    # The table first: it is not lost when the file cannot be written.
    click.echo(format_report(report), err=json_out == "-")
    if json_out is None:
        return
    text = json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
    if target is None:
        click.echo(text)
    else:
        _write(target, text + "\n")


def _check_target(target: Path) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if target.is_dir():
        raise ConfigurationError(f"--json {target}: a folder, expected the name of a file")
    if not target.parent.is_dir():
        raise ConfigurationError(f"--json {target}: no folder {target.parent}; make it first")


def _write(target: Path, text: str) -> None:
    from duet_unlearn.files import write_text

    try:
        write_text(target, text)
    except CacheError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise ConfigurationError(
            f"--json {target}: cannot be written ({reason}); name a file in another folder"
        ) from error
