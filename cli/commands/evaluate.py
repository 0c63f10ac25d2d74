"""`duet-distill eval`: compare what models still answer."""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.options import FolderPath, SettingsCommand, read_settings
from duet_unlearn.cli.output import check_target, json_option, json_text, write_target
from duet_unlearn.errors import StoppedError
from duet_unlearn.evaluation.config import EvalConfig, parse_models


@click.command("eval", cls=SettingsCommand, settings=EvalConfig)
@click.argument("words", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="Read settings from this YAML file; flags win over it.",
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    help="What answers; vLLM is faster where there are many queries.",
)
@click.option(
    "--out",
    type=FolderPath(),
    metavar="FILE",
    help="Also write everything, each answer too, to this JSON file: `duet-distill report` reads "
    "it.",
)
@json_option
@click.pass_context
def eval_command(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    config_file: str | None,
    engine: str,
    out: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Answer queries with each MODEL and score the answers, side by side.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL to name its row; the
    first one is the reference.
    """
    config = read_settings(ctx, EvalConfig, config_file, models=parse_models(words))
    if out is not None:
        check_target(out, '"duet-unlearn": "')  # among the versions
    try:
        from duet_unlearn.evaluation.evaluate import evaluate
        from duet_unlearn.evaluation.requirements import check_requirements
        from duet_unlearn.evaluation.table import format_report
        from duet_unlearn.teacher_cache.answering import vllm_answers

        report = evaluate(config, vllm_answers(config) if engine == "vllm" else None)
    except KeyboardInterrupt as error:
        raise StoppedError("stopped; an evaluation keeps no parts, so start it again") from error
    # The table first: it is not lost when the file cannot be written.
    click.echo(format_report(report), err=as_json)
    document = json_text(report.to_json()) if as_json or out is not None else ""
    if as_json:
        click.echo(document)
    if out is not None:
        write_target(out, document + "\n")
    if config.require:
        check_requirements(config.require, report)
