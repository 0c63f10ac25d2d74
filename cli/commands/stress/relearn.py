"""`duet-distill relearn`: does what was forgotten come back by training?"""

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
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.evaluation.config import parse_models


@click.command("relearn", cls=SettingsCommand, settings=RelearnConfig)
@models_argument
@config_option
@out_option("`duet-distill report` shows its curves")
@json_option
@click.pass_context
def relearn_command(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    config_file: str | None,
    out: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Fine-tune each MODEL on some answers and ask for the others: what comes back?

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL: a student, the base,
    a model that never knew. No file of theirs changes.
    """
    config = read_settings(ctx, RelearnConfig, config_file, models=parse_models(words))
    with measuring(out):
        from duet_unlearn.distill.relearning.relearn import relearn
        from duet_unlearn.distill.relearning.results import format_relearning

        report = relearn(config)
    print_report(format_relearning(report), report, as_json=as_json, out=out)
