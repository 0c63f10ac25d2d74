"""`duet-distill probe`: does a model still hold inside what it no longer says?"""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.options import SettingsCommand, models_argument, out_option, read_settings
from duet_unlearn.cli.output import json_option, measuring, print_report
from duet_unlearn.evaluation.config import parse_models
from duet_unlearn.evaluation.probing.config import ProbeConfig


@click.command("probe", cls=SettingsCommand, settings=ProbeConfig)
@models_argument
@out_option("`duet-distill report` shows its curves")
@json_option
@click.pass_context
def probe_command(
    ctx: click.Context, /, words: tuple[str, ...], out: Path | None, as_json: bool, **_: Any
) -> None:
    """Look for the forgotten answers in every layer of each MODEL.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL; the first one is the
    reference. Reads each query once, by the logit lens and by a linear probe.
    """
    config = read_settings(ctx, ProbeConfig, models=parse_models(words))
    with measuring(out):
        from duet_unlearn.evaluation.probing.probe import probe
        from duet_unlearn.evaluation.probing.results import format_probe

        report = probe(config)
    print_report(format_probe(report), report, as_json=as_json, out=out)
