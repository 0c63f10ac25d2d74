"""From a run's settings to the arguments of transformers' Trainer."""

import difflib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from duet_unlearn.errors import ConfigurationError, first_line

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from duet_unlearn.distill.config import RunConfig

# Settings of a run that are fields of TrainingArguments as they are.
_SAME = (
    *("gradient_accumulation_steps", "gradient_checkpointing", "learning_rate", "seed"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps"),
    "report_to",
)
# All fields that a run has settings of its own for, with their names.
_OURS = {
    "output_dir": "out",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "bf16": "precision",
    "fp16": "precision",
    "load_best_model_at_end": "checkpoint_selection",
    **{name: name for name in (*_SAME, "max_steps", "save_steps", "eval_steps")},
}
# What order, loss, checkpoints and evaluation rest on, and what would send the student elsewhere.
_FIXED = (
    *("auto_find_batch_size", "average_tokens_across_devices", "data_seed", "disable_tqdm"),
    *("ddp_find_unused_parameters", "greater_is_better", "ignore_data_skip", "label_names"),
    *("label_smoothing_factor", "length_column_name", "local_rank", "logging_first_step"),
    *("logging_nan_inf_filter", "logging_strategy", "metric_for_best_model", "push_to_hub"),
    *("remove_unused_columns", "resume_from_checkpoint", "save_only_model", "save_strategy"),
    *("save_total_limit", "train_sampling_strategy", "use_cpu", "use_liger_kernel"),
)
_FIXED_PREFIXES = ("dataloader_", "do_", "eval_", "hub_")
_NUMBERS = {bool, int, float}
_FINITE = ConfigDict(allow_inf_nan=False)
_NEVER = 2**31 - 1
_TRACKER_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_trainer_args(trainer_args: Mapping[str, Any]) -> None:
    """Refuse fields of TrainingArguments that are not the user's to pass through.

    Raises:
        ConfigurationError: A field is ours.
    """
    for name in trainer_args:
        if name in _OURS:
            flag = _OURS[name].replace("_", "-")
            raise ConfigurationError(
                f"trainer_args has {name}, which is a setting of its own; give --{flag} instead"
            )
        if name in _FIXED or name.startswith(_FIXED_PREFIXES):
            raise ConfigurationError(
                f"trainer_args has {name}, which the run itself decides; leave it out"
            )


def training_arguments(config: "RunConfig", work: Path) -> "TrainingArguments":
    """Return the Trainer's arguments; several processes find each other here.

    Raises:
        ConfigurationError: The Trainer refuses a setting on this machine, does not know one, or
            there are more processes and micro-batches than queries in a step.
    """
    import torch
    from transformers import TrainingArguments

    _check_tracker(config.report_to)
    passed = _typed(config.trainer_args, TrainingArguments) if config.trainer_args else {}
    precision = config.precision
    if precision == "auto":
        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # Beside weights in bfloat16, an adapter in float32 would have every sum made in float32.
        adapted = config.lora_rank is not None and config.dtype == "bfloat16"
        halved = adapted or (on_gpu and config.dtype == "float32")
        precision = "bf16" if halved else "float32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigurationError(
            "precision is 'fp16', but there is no CUDA GPU; expected auto, float32 or bf16"
        )
    keeps_best = bool(config.eval_steps) and config.checkpoint_selection == "best"
    settings: dict[str, Any] = {
        **passed,
        "output_dir": str(work),
        **{name: getattr(config, name) for name in _SAME},
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_steps or keeps_best else "no",
        "save_steps": config.save_steps or _NEVER,
        # The one before the last is there for the day on which the last turns out damaged.
        "save_total_limit": 3 if keeps_best else 2,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        # Without it, several processes on a machine that has no accelerator do not find each
        # other.
        "use_cpu": not torch.accelerator.is_available(),
    }
    try:
        args = TrainingArguments(**settings)
        # The Trainer looks `log_level` up later, where an unknown one is a KeyError.
        args.get_process_log_level()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise ConfigurationError(
            f"the Trainer refuses these settings: {first_line(error)}"
        ) from error
    passes = config.gradient_accumulation_steps * args.world_size
    if passes > int(config.batch_size):
        raise ConfigurationError(
            f"batch_size is {config.batch_size}, expected at least {passes}: "
            f"{args.world_size} processes with {config.gradient_accumulation_steps} "
            "micro-batches need a query each"
        )
    # Informative only: the sampler makes the batches.
    args.per_device_train_batch_size = math.ceil(int(config.batch_size) / passes)
    return args


def _typed(passed: Mapping[str, Any], of: "type[TrainingArguments]") -> dict[str, Any]:
    """Return fields of TrainingArguments, numbers as their types: it looks at few by itself."""
    types, typed = get_type_hints(of), dict(passed)
    for name, value in passed.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see transformers' own list"
            raise ConfigurationError(
                f"trainer_args has {name!r}, which TrainingArguments does not know; {hint}"
            )
        if not {types[name], *get_args(types[name])} & _NUMBERS:
            continue
        try:
            typed[name] = TypeAdapter(types[name], config=_FINITE).validate_python(value)
        except ValidationError as error:
            raise ConfigurationError(
                f"trainer_args has {name}={value!r}: {error.errors()[0]['msg'].lower()}"
            ) from error
    return typed


def _check_tracker(report_to: str) -> None:
    modules = _TRACKER_MODULES.get(report_to, ())
    if modules and not any(importlib.util.find_spec(name) for name in modules):
        raise ConfigurationError(
            f"report_to is {report_to!r}, but {modules[-1]} is not installed; pip install "
            f"{modules[-1]}, or leave --report-to out"
        )
