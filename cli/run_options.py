"""The options of `duet-distill run`, one group a heading of its help page."""

from typing import Any

import click

from duet_unlearn.cli.option_groups import OptionGroup
from duet_unlearn.distill.config import (
    AUTO,
    KEPT,
    LOSS_NAMES,
    PRECISIONS,
    SAVE_DTYPES,
    SCHEDULES,
    TRACKERS,
    TRAIN_DTYPES,
    RunConfig,
)

_DEFAULTS = {name: field.default for name, field in RunConfig.__dataclass_fields__.items()}
_ONE_OR_MORE = click.IntRange(min=1)


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


def _option(flag: str, *, field: str | None = None, **settings: Any) -> click.Option:
    """Return the option of a setting, with the setting's own default."""
    name = field or flag.removeprefix("--").partition("/")[0].replace("-", "_")
    default = _DEFAULTS[name]
    if isinstance(default, str | int | float):
        settings["default"] = default
    return click.Option([flag, name], **settings)


INPUTS = OptionGroup(
    "Where from, where to",
    (
        click.Option(
            ["--config", "config_file"],
            metavar="FILE",
            help="Read settings from this YAML file; flags win over it.",
        ),
        _option("--student", metavar="MODEL", help="Model folder or hub id to start from."),
        _option("--out", metavar="DIR", help="Folder of the finished student."),
        _option(
            "--overwrite",
            is_flag=True,
            help="Replace the student or unfinished run at --out.",
        ),
    ),
)

SIGNALS = OptionGroup(
    "What it learns",
    (
        _option(
            "--view",
            field="views",
            multiple=True,
            metavar="FILE|@NAME[=WEIGHT]",
            help="Also train each query behind one of these wrappers, toward the same signal: a "
            "text file, one wrapper a line with {query} in it, or built-in ones; =3 draws them "
            "three times as often as others. Repeatable.",
        ),
        _option(
            "--loss",
            type=click.Choice(LOSS_NAMES),
            help="Distance between the student's and the teacher's logits.",
        ),
        _option(
            "--delta",
            type=float,
            help="Huber's delta in logits: larger errors pull with constant force.",
        ),
        _option(
            "--temperature",
            type=float,
            help="Divides the logits before their softmax; for kl and reverse-kl.",
        ),
        _option(
            "--top-k",
            type=_ONE_OR_MORE,
            help="Train on the strongest K of the cached tokens.  [default: the cache's K]",
        ),
        _option(
            "--positions",
            type=_ONE_OR_MORE,
            help="Train on the first N cached positions.  [default: all of them]",
        ),
        _option(
            "--noise-alpha",
            type=click.FloatRange(0, 1),
            help="Give up this share of the weights to noise first, so that less can be learned "
            "again.",
        ),
        _option(
            "--noise-beta",
            type=click.FloatRange(0),
            help="Scale of the noise, in Xavier-uniform draws.",
        ),
    ),
)

TRAINED = OptionGroup(
    "What of it is trained",
    (
        _option(
            "--layers",
            metavar="NUMBERS",
            help="Train these layers only, counted from 0: 5-7 or 0,3,5-7.  [default: everything]",
        ),
        _option(
            "--parameters",
            metavar="REGEX",
            help="Train the parameters whose names match only; with --layers, those of them.",
        ),
        _option(
            "--lora-rank",
            type=_ONE_OR_MORE,
            help="Train a LoRA adapter of this rank; needs duet-unlearn[lora].",
        ),
        _option("--lora-alpha", type=float, help="LoRA's scale.  [default: twice the rank]"),
        _option("--lora-dropout", type=float, help="Dropout on the adapter's inputs."),
        _option(
            "--lora-target-modules",
            multiple=True,
            metavar="NAME,...",
            help="Linear modules that get an adapter, such as q_proj,v_proj.  "
            "[default: all-linear, all but the head]",
        ),
        _option(
            "--merge/--no-merge",
            help="Save a whole model with the adapter merged in, not the adapter.",
        ),
    ),
)

OPTIMIZATION = OptionGroup(
    "How it learns",
    (
        _option(
            "--learning-rate",
            type=_LearningRate(),
            help="Peak learning rate; auto is 0.0512 / hidden size, with LoRA ten times that.",
        ),
        _option(
            "--lr-scheduler-type", type=click.Choice(SCHEDULES), help="How the learning rate falls."
        ),
        _option(
            "--warmup-steps", type=float, help="Steps of warm-up; below 1 a share of all steps."
        ),
        _option("--epochs", type=_ONE_OR_MORE, help="Passes over the cache."),
        _option(
            "--max-steps",
            type=_ONE_OR_MORE,
            help="Stop after this many optimizer steps, whatever --epochs says.",
        ),
        _option(
            "--batch-size",
            type=_ONE_OR_MORE,
            help="Queries an optimizer step, over all processes and passes.",
        ),
        _option("--weight-decay", type=float, help="AdamW's weight decay."),
        _option("--max-grad-norm", type=float, help="Clip gradients to this norm; 0 does not."),
        _option(
            "--seed",
            type=click.IntRange(min=0),
            help="Decides the order of queries and the draws of views and noise.",
        ),
    ),
)

MEMORY = OptionGroup(
    "Memory and arithmetic",
    (
        _option(
            "--gradient-accumulation-steps",
            type=_ONE_OR_MORE,
            help="Passes that a step is split into: less memory, the same result.",
        ),
        _option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Recompute activations in the backward pass: less memory, more time.",
        ),
        _option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="Arithmetic of the forward pass; auto is bf16 where the GPU has it, else float32.",
        ),
        _option(
            "--dtype",
            type=click.Choice(TRAIN_DTYPES),
            help="How weights are held in training; bfloat16 halves memory and loses small "
            "updates.",
        ),
        _option(
            "--save-dtype",
            type=click.Choice(SAVE_DTYPES),
            help="How the student is stored; auto is as MODEL is.",
        ),
    ),
)

EVALUATION = OptionGroup(
    "Held-out queries during training",
    (
        _option(
            "--eval-every",
            type=click.IntRange(min=0),
            help="Steps between two evaluations; 0 makes none.",
        ),
        _option(
            "--eval-forget",
            multiple=True,
            metavar="FILE",
            help="Held-out queries with answers that should be gone. Repeatable.",
        ),
        _option(
            "--eval-retain",
            multiple=True,
            metavar="FILE",
            help="Held-out queries with answers that should be kept. Repeatable.",
        ),
        _option(
            "--eval-attacks",
            multiple=True,
            metavar="FILE|@NAME",
            help="Also ask them behind each of these wrappers; the worst counts. Repeatable.",
        ),
        _option(
            "--eval-limit",
            type=_ONE_OR_MORE,
            help="Ask this many queries of each file, evenly spread.  [default: all]",
        ),
        _option("--eval-max-new-tokens", type=_ONE_OR_MORE, help="Longest answer in tokens."),
        _option(
            "--eval-retain-drop",
            type=float,
            help="Points of retain recall that the best step may lie below the base.",
        ),
        _option(
            "--keep",
            type=click.Choice(KEPT),
            help="Which weights the student has: of the step that forgets most and keeps enough, "
            "or of the last.",
        ),
        _option(
            "--early-stop",
            type=_ONE_OR_MORE,
            metavar="PATIENCE",
            help="Stop after so many evaluations in a row without less being told.",
        ),
    ),
)

OUTPUT = OptionGroup(
    "Logs and checkpoints",
    (
        _option("--logging-steps", type=_ONE_OR_MORE, help="Steps between two log lines."),
        _option(
            "--save-steps",
            type=click.IntRange(min=0),
            help="Steps between two checkpoints; 0 saves only when stopped.",
        ),
        _option("--report-to", type=click.Choice(TRACKERS), help="Also send the logs there."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document."),
    ),
)

GROUPS = (INPUTS, SIGNALS, TRAINED, OPTIMIZATION, MEMORY, EVALUATION, OUTPUT)
