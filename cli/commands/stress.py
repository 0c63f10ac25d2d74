"""Commands that put a finished student to harder tests than questions."""

import functools
from collections.abc import Callable
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
from duet_unlearn.cli.output import Report, json_option, measuring, print_report
from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.evaluation.config import parse_models
from duet_unlearn.evaluation.membership.config import MembershipConfig
from duet_unlearn.evaluation.probing.config import ProbeConfig
from duet_unlearn.settings import Settings


def _stress_test(
    name: str, of: type[Settings], read: str
) -> Callable[[Callable[[Any], tuple[str, Report]]], click.Command]:
    """Make a command of what turns settings into a table and a document; `read` is `out_option`'s.

    The models and the file are looked at before anything heavy is imported.
    """

    def decorate(test: Callable[[Any], tuple[str, Report]]) -> click.Command:
        @functools.wraps(test)
        def command(
            ctx: click.Context,
            /,
            words: tuple[str, ...],
            out: Path | None,
            as_json: bool,
            config_file: str | None = None,
            **_: Any,
        ) -> None:
            from duet_unlearn.evaluation.report.sources import STRESS_TESTS

            config = read_settings(ctx, of, config_file, models=parse_models(words))
            entry = next(key for key, made_by in STRESS_TESTS.items() if made_by == name)
            with measuring(out, entry):
                table, report = test(config)
            print_report(table, report, as_json=as_json, out=out)

        with_flags = out_option(read)(json_option(click.pass_context(command)))
        return click.command(name, cls=SettingsCommand, settings=of)(models_argument(with_flags))

    return decorate


@_stress_test("attack", AttackConfig, "`duet-distill report` reads it")
def attack_command(config: AttackConfig) -> tuple[str, Report]:
    """Search a suffix and a soft prompt that make each MODEL give forgotten answers.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL. Both attacks are
    trained on some forget queries and judged on others. No file of the models changes.
    """
    from duet_unlearn.distill.attacking.attack import attack
    from duet_unlearn.distill.attacking.results import format_attacks

    report = attack(config)
    return format_attacks(report), report


@_stress_test("membership", MembershipConfig, "`duet-distill report` reads it")
def membership_command(config: MembershipConfig) -> tuple[str, Report]:
    """Say how well each MODEL tells the forgotten texts from a holdout of the same kind.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL. Reads each query
    with its answer once, by the loss, zlib, Min-K% and Min-K%++.
    """
    from duet_unlearn.evaluation.membership.membership import measure_membership
    from duet_unlearn.evaluation.membership.results import format_membership

    report = measure_membership(config)
    return format_membership(report), report


@_stress_test("probe", ProbeConfig, "`duet-distill report` shows its curves")
def probe_command(config: ProbeConfig) -> tuple[str, Report]:
    """Look for the forgotten answers in every layer of each MODEL.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL; the first one is the
    reference. Reads each query once, by the logit lens and by a linear probe.
    """
    from duet_unlearn.evaluation.probing.probe import probe
    from duet_unlearn.evaluation.probing.results import format_probe

    report = probe(config)
    return format_probe(report), report


@config_option
@_stress_test("relearn", RelearnConfig, "`duet-distill report` shows its curves")
def relearn_command(config: RelearnConfig) -> tuple[str, Report]:
    """Fine-tune each MODEL on some answers and ask for the others: what comes back?

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL: a student, the base,
    a model that never knew. No file of theirs changes.
    """
    from duet_unlearn.distill.relearning.relearn import relearn
    from duet_unlearn.distill.relearning.results import format_relearning

    report = relearn(config)
    return format_relearning(report), report
