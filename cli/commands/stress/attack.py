"""`duet-distill attack`: does a searched prompt bring back what was forgotten?"""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.cli.options import FolderPath, SettingsCommand, read_settings
from duet_unlearn.cli.output import check_target, json_option, print_report
from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.errors import StoppedError
from duet_unlearn.evaluation.config import parse_models


@click.command("attack", cls=SettingsCommand, settings=AttackConfig)
@click.argument("words", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--out",
    type=FolderPath(),
    metavar="FILE",
    help="Also write everything to this JSON file: `duet-distill report` reads it.",
)
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
    if out is not None:
        check_target(out, '"duet-unlearn": "')  # among the versions
    try:
        from duet_unlearn.distill.attacking.attack import attack
        from duet_unlearn.distill.attacking.results import format_attacks

        report = attack(config)
    except KeyboardInterrupt as error:
        raise StoppedError("stopped; an attack keeps no parts, so start it again") from error
    print_report(format_attacks(report), report, as_json=as_json, out=out)
