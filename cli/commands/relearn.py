"""`duet-distill relearn`: does what was forgotten come back by training?"""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.options import FolderPath, SettingsCommand, read_settings
from duet_unlearn.cli.output import check_target, json_option, print_report
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.errors import StoppedError
from duet_unlearn.evaluation.config import parse_models


@click.command("relearn", cls=SettingsCommand, settings=RelearnConfig)
@click.argument("words", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="Read settings from this YAML file; flags win over it.",
)
@click.option(
    "--out",
    type=FolderPath(),
    metavar="FILE",
    help="Also write everything to this JSON file: `duet-distill report` shows its curves.",
)
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
    if out is not None:
        check_target(out, '"duet-unlearn": "')  # among the versions
    try:
        from duet_unlearn.distill.relearning.relearn import relearn
        from duet_unlearn.distill.relearning.results import format_relearning

        report = relearn(config)
    except KeyboardInterrupt as error:
        raise StoppedError("stopped; a relearning keeps no parts, so start it again") from error
    print_report(format_relearning(report), report, as_json=as_json, out=out)
