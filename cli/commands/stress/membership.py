"""`duet-distill membership`: does a model still tell what it was trained on?"""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.options import SettingsCommand, models_argument, out_option, read_settings
from duet_unlearn.cli.output import json_option, measuring, print_report
from duet_unlearn.evaluation.config import parse_models
from duet_unlearn.evaluation.membership.config import MembershipConfig


@click.command("membership", cls=SettingsCommand, settings=MembershipConfig)
@models_argument
@out_option("`duet-distill report` reads it")
@json_option
@click.pass_context
def membership_command(
    ctx: click.Context, /, words: tuple[str, ...], out: Path | None, as_json: bool, **_: Any
) -> None:
    """Say how well each MODEL tells the forgotten texts from a holdout of the same kind.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL. Reads each query
    with its answer once, by the loss, zlib, Min-K% and Min-K%++.
    """
    config = read_settings(ctx, MembershipConfig, models=parse_models(words))
    with measuring(out):
        from duet_unlearn.evaluation.membership.membership import measure_membership
        from duet_unlearn.evaluation.membership.results import format_membership

        report = measure_membership(config)
    print_report(format_membership(report), report, as_json=as_json, out=out)
