"""`duet-distill plan`: memory, disk and time of a run before anything runs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.options import SettingsCommand, config_option, read_settings
from duet_unlearn.cli.output import json_option, print_json
from duet_unlearn.distill.plan_config import PlanConfig

if TYPE_CHECKING:
    from duet_unlearn.distill.plan import Plan

_COUNTED, _ESTIMATED, _MEASURED = "counted", "estimated", "measured"


@click.command("plan", cls=SettingsCommand, settings=PlanConfig)
@config_option
@json_option
@click.pass_context
def plan_command(ctx: click.Context, /, config_file: str | None, as_json: bool, **_: Any) -> None:
    """Estimate what the same `run` command takes: memory, disk and, from a few real steps, time.

    A MODEL without weights, only a config.json, is enough for all but the measured part. Figures
    are per process, on this machine.
    """
    config = read_settings(ctx, PlanConfig, config_file)
    from duet_unlearn.distill.plan import plan

    result = plan(config)
    if as_json:
        print_json(result.to_json())
        return
    for line in _lines(result):
        click.echo(line)


def _lines(plan: "Plan") -> Iterator[str]:
    """Yield the table, then what to know about it."""
    previous = ""
    for section, name, value, source in _rows(plan):
        yield f"{section if section != previous else '':9} {name:24} {value:>16}  {source}"
        previous = section
    yield ""
    yield f"trains {plan.trained} of {plan.student}, one process on {plan.device}"
    for note in plan.notes:
        yield f"note: {note}"


def _rows(plan: "Plan") -> Iterator[tuple[str, str, str, str]]:
    """Yield section, name, value and where the value is from."""
    rows, tokens = plan.longest_batch
    yield "student", "parameters", f"{plan.parameters:,}", _COUNTED
    yield "student", "trained", f"{plan.trained_parameters:,}", _COUNTED
    yield "student", "weights, arithmetic", f"{plan.dtype}, {plan.precision}", _COUNTED
    yield "work", "queries", f"{sum(plan.queries.values()):,}", _COUNTED
    yield "work", "sequences an epoch", f"{plan.sequences_per_epoch:,}", _COUNTED
    yield "work", "steps an epoch", f"{plan.steps_per_epoch:,}", _COUNTED
    yield "work", "steps of the run", f"{plan.steps:,}", _COUNTED
    yield "work", "largest forward pass", f"{rows} x {tokens} tokens", _COUNTED
    sizes = {"memory": plan.memory, "disk": plan.disk, "build": plan.build}
    for section, values in sizes.items():
        for name, value in values.items():
            source = _COUNTED if section == "build" and name.startswith("cache") else _ESTIMATED
            yield section, name.replace("_", " "), _size(value), source
    if (found := plan.measured) is not None:
        source = f"{_MEASURED}, {found.steps} steps"
        yield "memory", "peak", _size(found.peak_memory_bytes), source
        yield "time", "a step", f"{found.step_seconds:.3f} s", source
        yield "time", "start-up and saving", f"{found.start_up_seconds:.1f} s", source
        yield "time", "the whole run", _time(found.run_seconds), _ESTIMATED


def _size(count: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:,.2f} {unit}"
    return f"{count} B"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
