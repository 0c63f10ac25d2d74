"""`duet-distill eval`: compare what models still answer."""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.options import (
    SettingsCommand,
    config_option,
    models_argument,
    out_option,
    read_settings,
)
from duet_unlearn.cli.output import json_option, measuring, print_report
from duet_unlearn.evaluation.config import EvalConfig, parse_models


@click.command("eval", cls=SettingsCommand, settings=EvalConfig)
@models_argument
@config_option
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    help="What answers; vLLM is faster where there are many queries.",
)
@out_option("`duet-distill report` reads it")
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
    first one is the reference. A NAME given to several models makes them seeds: their line of the
    table has mean and standard deviation, and every seed is held to --require.
    """
    config = read_settings(ctx, EvalConfig, config_file, models=parse_models(words))
    with measuring(out, "performance_shift"):
        from duet_unlearn.evaluation.evaluate import evaluate
        from duet_unlearn.evaluation.requirements import check_requirements
        from duet_unlearn.evaluation.table import format_report
        from duet_unlearn.teacher_cache.answering import vllm_answers

        report = evaluate(config, vllm_answers(config) if engine == "vllm" else None)
    print_report(format_report(report), report, as_json=as_json, out=out)
    if config.require:
        check_requirements(config.require, report)
