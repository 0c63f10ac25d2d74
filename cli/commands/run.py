"""`duet-distill run`: train a student from a cache, or for another objective."""

import os
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.options import SettingsCommand, config_option, read_settings
from duet_unlearn.cli.output import json_option, print_json
from duet_unlearn.distill.config import RunConfig

if TYPE_CHECKING:
    from duet_unlearn.distill.job import RunResult


@click.command("run", cls=SettingsCommand, settings=RunConfig)
@config_option
@json_option
@click.pass_context
def run_command(ctx: click.Context, /, config_file: str | None, as_json: bool, **_: Any) -> None:
    """Fit a student to the signals of CACHE: a folder or a URL, with @sha256:DIGEST to pin it.

    Needs neither the teacher nor vLLM. The same command resumes a run that was stopped. Every
    setting may stand in a YAML file instead (--config), under its flag's name with underscores.
    """
    config = read_settings(ctx, RunConfig, config_file)
    from duet_unlearn.distill.run import run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # torchrun runs this once a process
        _print_result(result, as_json=as_json)


def _print_result(result: "RunResult", *, as_json: bool) -> None:
    import dataclasses

    if as_json:
        print_json(dataclasses.asdict(result))
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
        recalls = "forget" in result.evaluations[0]
        names, digits = (("forget", "retain"), 1) if recalls else (("loss", "cross_entropy"), 4)
        what = "recall of ROUGE-L in points" if recalls else "rows"
        click.echo(f"held-out {what}\n  step  {'  '.join(names)}")
        for found in result.evaluations:
            note = "  base" if found["step"] == 0 else ""
            if found["step"] == result.kept_step:
                note = "  <- the student"
            cells = "".join(f"  {found[name]:>{len(name)}.{digits}f}" for name in names)
            click.echo(f"{found['step']:>6}{cells}{note}")
