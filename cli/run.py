"""`duet-distill run`: train a student from a cache."""

import json
import os
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.distill.config import (
    AUTO,
    LOSS_NAMES,
    PRECISIONS,
    SAVE_DTYPES,
    SCHEDULES,
    TRACKERS,
    TRAIN_DTYPES,
    RunConfig,
)

if TYPE_CHECKING:
    from duet_unlearn.distill.run import RunResult

_DEFAULTS = {name: field.default for name, field in RunConfig.__dataclass_fields__.items()}


class _LearningRate(click.ParamType[float | str]):
    """`auto` or a number."""

    name = "auto|RATE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        """Turn the text of the flag into a number, `auto` stays."""
        if value == AUTO:
            return AUTO
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number or 'auto'", param, ctx)


@click.command("run")
@click.argument("cache")
@click.option(
    "--student", required=True, metavar="MODEL", help="Model folder or hub id to start from."
)
@click.option("--out", required=True, metavar="DIR", help="Folder of the finished student.")
@click.option(
    "--view",
    "views",
    multiple=True,
    metavar="FILE|@NAME",
    help="Also train each query behind one of these wrappers, toward the same signal: a text "
    "file, one wrapper a line with {query} in it, or built-in ones. Repeatable.",
)
@click.option(
    "--loss",
    type=click.Choice(LOSS_NAMES),
    default=_DEFAULTS["loss"],
    help="Distance between the student's and the teacher's raw logits.",
)
@click.option(
    "--delta",
    type=float,
    default=_DEFAULTS["delta"],
    help="Huber's delta in logits: larger errors pull with constant force.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Train on the strongest K of the cached tokens.  [default: the cache's K]",
)
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    help="Train on the first N cached positions.  [default: all of them]",
)
@click.option(
    "--noise-alpha",
    type=click.FloatRange(0, 1),
    default=_DEFAULTS["noise_alpha"],
    help="Give up this share of the weights to noise first, so that less can be learned again.",
)
@click.option(
    "--noise-beta",
    type=click.FloatRange(0),
    default=_DEFAULTS["noise_beta"],
    help="Scale of the noise, in Xavier-uniform draws.",
)
@click.option(
    "--learning-rate",
    type=_LearningRate(),
    default=_DEFAULTS["learning_rate"],
    help="Peak learning rate; auto is 0.0512 / hidden size.",
)
@click.option(
    "--lr-scheduler-type",
    type=click.Choice(SCHEDULES),
    default=_DEFAULTS["lr_scheduler_type"],
    help="How the learning rate falls.",
)
@click.option(
    "--warmup-steps",
    type=float,
    default=_DEFAULTS["warmup_steps"],
    help="Steps of warm-up; below 1 a share of all steps.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=_DEFAULTS["epochs"],
    help="Passes over the cache.",
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    help="Stop after this many optimizer steps, whatever --epochs says.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=_DEFAULTS["batch_size"],
    help="Queries an optimizer step, over all processes and passes.",
)
@click.option(
    "--gradient-accumulation-steps",
    type=click.IntRange(min=1),
    default=_DEFAULTS["gradient_accumulation_steps"],
    help="Passes that a step is split into: less memory, the same result.",
)
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Recompute activations in the backward pass: less memory, more time.",
)
@click.option(
    "--weight-decay",
    type=float,
    default=_DEFAULTS["weight_decay"],
    help="AdamW's weight decay.",
)
@click.option(
    "--max-grad-norm",
    type=float,
    default=_DEFAULTS["max_grad_norm"],
    help="Clip gradients to this norm; 0 does not.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=_DEFAULTS["precision"],
    help="Arithmetic of the forward pass; auto is bf16 where the GPU has it, else float32.",
)
@click.option(
    "--dtype",
    type=click.Choice(TRAIN_DTYPES),
    default=_DEFAULTS["dtype"],
    help="How weights are held in training; bfloat16 halves memory and loses small updates.",
)
@click.option(
    "--save-dtype",
    type=click.Choice(SAVE_DTYPES),
    default=_DEFAULTS["save_dtype"],
    help="How the student is stored; auto is as MODEL is.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=_DEFAULTS["seed"],
    help="Decides the order of queries and the draw of views.",
)
@click.option(
    "--logging-steps",
    type=click.IntRange(min=1),
    default=_DEFAULTS["logging_steps"],
    help="Steps between two log lines.",
)
@click.option(
    "--save-steps",
    type=click.IntRange(min=0),
    default=_DEFAULTS["save_steps"],
    help="Steps between two checkpoints; 0 saves only when stopped.",
)
@click.option(
    "--report-to",
    type=click.Choice(TRACKERS),
    default=_DEFAULTS["report_to"],
    help="Also send the logs there.",
)
@click.option("--overwrite", is_flag=True, help="Replace the student or unfinished run at --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def run_command(as_json: bool, **settings: Any) -> None:
    """Fit a student to the signals of CACHE: a folder or a URL, with @sha256:DIGEST to pin it.

    Needs neither the teacher nor vLLM. The same command goes on with a run that was stopped.
    """
    config = RunConfig(**settings)
    from duet_unlearn.distill.run import run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # torchrun runs this once a process
        _print_result(result, as_json=as_json)


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
    for split, (first, last) in result.loss.items():
        click.echo(f"loss {split} {first:.4f} -> {last:.4f}")
