"""`duet-distill attack`: does a searched prompt bring back what was forgotten?"""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.options import SettingsCommand, models_argument, out_option, read_settings
from duet_unlearn.cli.output import json_option, measuring, print_report
from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.evaluation.config import parse_models


@click.command("attack", cls=SettingsCommand, settings=AttackConfig)
@models_argument
@out_option("`duet-distill report` reads it")
@json_option
@click.pass_context
def attack_command(
    ctx: click.Context, /, words: tuple[str, ...], out: Path | None, as_json: bool, **_: Any
) -> None:
    """Search a suffix and a soft prompt that make each MODEL give forgotten answers.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL. Both attacks are
    trained on some forget queries and judged on others. No file of the models changes.
    """
    config = read_settings(ctx, AttackConfig, models=parse_models(words))
    with measuring(out):
        from duet_unlearn.distill.attacking.attack import attack
        from duet_unlearn.distill.attacking.results import format_attacks

        report = attack(config)
    print_report(format_attacks(report), report, as_json=as_json, out=out)
