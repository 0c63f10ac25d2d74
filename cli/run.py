"""`duet-distill run`: train a student from a cache."""

import json
import os
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from duet_unlearn.cli.option_groups import GroupedCommand
from duet_unlearn.cli.run_options import GROUPS
from duet_unlearn.distill.config_file import load_config

if TYPE_CHECKING:
    from duet_unlearn.distill.job import RunResult

_NEEDED = {"cache": "CACHE", "student": "--student", "out": "--out"}


@click.command("run", cls=GroupedCommand, groups=GROUPS)
@click.argument("cache", required=False)
@click.pass_context
def run_command(
    ctx: click.Context, /, config_file: str | None, as_json: bool, **settings: Any
) -> None:
    """Fit a student to the signals of CACHE: a folder or a URL, with @sha256:DIGEST to pin it.

    Needs neither the teacher nor vLLM. The same command goes on with a run that was stopped. Every
    setting may stand in a YAML file instead (--config), under its flag's name with underscores.
    """
    given = {
        name: value
        for name, value in settings.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    config = load_config(config_file, given, needed=_refuse_missing)
    from duet_unlearn.distill.run import run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # torchrun runs this once a process
        _print_result(result, as_json=as_json)


def _refuse_missing(names: list[str]) -> None:
    flag = _NEEDED[names[0]]
    kind = "argument" if flag == "CACHE" else "option"
    raise click.UsageError(
        f"Missing {kind} '{flag}'; give it, or write `{names[0]}:` into the file of --config."
    )


def _print_result(result: "RunResult", *, as_json: bool) -> None:
    import dataclasses

    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
        return
    queries = ", ".join(f"{count} {split}" for split, count in result.queries.items())
    if result.hit:
        click.echo(f"{result.out}: already there, trained by this very configuration")
    else:
        click.echo(f"{result.out}: {result.steps} steps in {result.seconds:.1f} s")
    click.echo(f"queries {queries}; learning rate {result.learning_rate:.3g}")
    if result.trained_parameters != result.parameters:
        click.echo(
            f"trained {result.trained}: {result.trained_parameters:,} parameters, the base has "
            f"{result.parameters:,}"
        )
    for split, (first, last) in result.loss.items():
        click.echo(f"loss {split} {first:.4f} -> {last:.4f}")
    if result.evaluations:
        _print_evaluations(result)


def _print_evaluations(result: "RunResult") -> None:
    click.echo("held-out recall of ROUGE-L in points\n  step  forget  retain")
    for found in result.evaluations:
        note = "  base" if found["step"] == 0 else ""
        if found["step"] == result.kept_step:
            note = "  <- the student"
        click.echo(f"{found['step']:>6}  {found['forget']:>6.1f}  {found['retain']:>6.1f}{note}")
