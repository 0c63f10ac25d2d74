"""From a run's settings to the arguments of transformers' Trainer."""

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from duet_unlearn.distill.config import AUTO, RunConfig
from duet_unlearn.errors import ConfigurationError


def training_arguments(config: RunConfig, work: Path) -> TrainingArguments:
    """Return the Trainer's arguments; several processes find each other here.

    Args:
        config: The run.
        work: Where checkpoints go.

    Raises:
        ConfigurationError: The Trainer refuses a setting on this machine, or there are more
            processes and passes than queries in a step.
    """
    precision = config.precision
    if precision == AUTO:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if bf16 and config.dtype == "float32" else "float32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigurationError(
            "precision is 'fp16', but there is no CUDA GPU; expected auto, float32 or bf16"
        )
    try:
        args = TrainingArguments(
            output_dir=str(work),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_checkpointing=config.gradient_checkpointing,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            learning_rate=float(config.learning_rate),
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            logging_steps=config.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps" if config.save_steps else "no",
            save_steps=config.save_steps or 500,
            save_total_limit=1,
            report_to=config.report_to,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            # Without it, several processes on a machine that has no accelerator do not find
            # each other.
            use_cpu=not torch.accelerator.is_available(),
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"the Trainer refuses these settings: {reason}") from error
    passes = config.gradient_accumulation_steps * args.world_size
    if passes > config.batch_size:
        raise ConfigurationError(
            f"batch_size is {config.batch_size}, expected at least {passes}: "
            f"{args.world_size} processes with {config.gradient_accumulation_steps} "
            "accumulation steps need a query each"
        )
    # Informative only: the sampler makes the batches.
    args.per_device_train_batch_size = math.ceil(config.batch_size / passes)
    return args
