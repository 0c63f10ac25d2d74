"""`duet-distill run`: fit a student. Neither vLLM nor the teacher is needed."""

import contextlib
import dataclasses
import logging
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from duet_unlearn.data.models.adapters import LOG_FILE
from duet_unlearn.data.models.loading import is_out_of_memory, load_model, no_bars, too_large
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.job import Job, RunResult, peak_memory, resolve_job
from duet_unlearn.distill.model.trainable import Trained, select_trained
from duet_unlearn.distill.output.student_folder import publish, write_student
from duet_unlearn.distill.training.checkpoint_selection import evaluations_of
from duet_unlearn.errors import ConfigurationError, DuetError, StoppedError, first_line
from duet_unlearn.teacher_cache.format.schema import SPLITS

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from duet_unlearn.distill.training.trainer import DuetTrainer

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> RunResult:
    """Train the student and leave it at `config.out`.

    The same configuration finds its finished student again, and resumes an interrupted run from
    its last checkpoint.

    Raises:
        ConfigurationError: A setting does not fit the inputs or the place of the student, the
            loss stopped being finite, or the memory does not hold a step.
        DataError: The student, a view or a query file is missing or malformed.
        CacheError: The cache is unfinished or damaged.
        MismatchError: The cache's tokens are not the student's.
        OutputError: The student or a checkpoint cannot be written.
        StoppedError: A signal stopped it after saving a checkpoint.
    """
    job = resolve_job(config)
    if not config.overwrite and (finished := job.folder.finished()) is not None:
        logger.info("%s: already there, trained by this very configuration", job.folder.out)
        return RunResult(**{**finished["result"], "out": str(job.folder.out), "hit": True})
    from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
    from duet_unlearn.distill.training.arguments import training_arguments

    tokenizer = load_tokenizer(job.student.folder)
    renderer = PromptRenderer(tokenizer)
    if job.held_out is not None:
        job.held_out.prepare(job.student, renderer, tokenizer)
    job.objective.prepare(renderer, job.held_out.texts if job.held_out else None)
    args = training_arguments(job.config, job.folder.work)
    if args.process_index != 0:
        _wait_for_all(args)  # until the first process has made the work folder
        return _train(job, args)
    with job.folder.lock():
        job.folder.prepare(overwrite=config.overwrite)
        _wait_for_all(args)
        return _train(job, args)


def _wait_for_all(args: "TrainingArguments") -> None:
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()


def _train(job: Job, args: "TrainingArguments") -> RunResult:
    """Train from the newest checkpoint that can be read, and publish."""
    while (checkpoint := job.folder.last_checkpoint()) is not None:
        try:
            return _train_from(job, args, checkpoint)
        except _DamagedCheckpointError as error:
            _wait_for_all(args)
            logger.warning(
                "%s: cannot be read (%s); training resumes from the one before",
                checkpoint,
                error,
            )
            if args.process_index == 0:
                job.folder.set_aside(checkpoint)
            _wait_for_all(args)
    return _train_from(job, args, None)


def _train_from(job: Job, args: "TrainingArguments", checkpoint: Path | None) -> RunResult:
    from duet_unlearn.distill.model.noise import perturb
    from duet_unlearn.distill.training.callbacks import (
        LogFile,
        ShowProgress,
        StepClock,
        StopOnSignal,
    )

    config, folder = job.config, job.folder
    stop, log, clock = StopOnSignal(), LogFile(folder.work / LOG_FILE), StepClock()
    trainer, trained = _make_trainer(job, args, [stop, ShowProgress(), log, clock])
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    elif job.held_out is not None:
        trainer.schedule.base = trainer.measure()
    if checkpoint is None and config.noise_alpha:
        perturb(trainer.student, alpha=config.noise_alpha, beta=config.noise_beta, seed=config.seed)
    logger.info("learning rate %.3g, %s epochs", config.learning_rate, config.epochs)
    if config.lora_rank is not None and config.lora_extrapolation != 1:
        logger.info("the adapter will be saved %g times as strong", config.lora_extrapolation)
    started = time.perf_counter()
    with stop.handling(), no_bars():
        _run_trainer(trainer, checkpoint, config)
    seconds = time.perf_counter() - started
    state = trainer.state
    if state.global_step < state.max_steps and not trainer.schedule.stopped_early(state):
        raise StoppedError(
            f"stopped and saved at step {state.global_step} of {state.max_steps}; run the same "
            "command again to resume"
        )
    trainer.check_weights()
    evaluations = evaluations_of(state.log_history)
    courses = {s: [h[k] for h in state.log_history if (k := f"loss_{s}") in h] for s in SPLITS}
    result = RunResult(
        out=str(folder.out),
        queries=job.objective.order.counts,
        views=job.objective.order.num_views,
        trained=trained.what,
        trained_parameters=trained.parameters,
        parameters=trained.of,
        steps=state.global_step,
        kept_step=trainer.load_best(),
        evaluations=[dataclasses.asdict(found) for found in evaluations],
        learning_rate=float(config.learning_rate),
        loss={split: [values[0], values[-1]] for split, values in courses.items() if values},
        seconds=round(seconds, 3),
        step_seconds=round(clock.median, 4),
        peak_memory_bytes=peak_memory(),
    )
    _warn_of_loss(config, result)
    write_student(job, trainer)
    if trainer.is_world_process_zero():
        publish(job, result)
    _wait_for_all(args)
    return result


# What the Trainer reads a checkpoint with.
_READS = ("_load_", "load_from_json")
# What it makes of its arguments when training starts.
_MAKES = ("create_optimizer", "create_scheduler")


class _DamagedCheckpointError(Exception):
    """A checkpoint could not be read."""


def _run_trainer(trainer: "DuetTrainer", checkpoint: Path | None, config: RunConfig) -> None:
    """Train to the end, with what can go wrong in one line.

    Raises:
        ConfigurationError: The memory does not hold a step, or the optimizer refuses a setting.
        _DamagedCheckpointError: The checkpoint cannot be read; nothing was trained.
    """
    from duet_unlearn.distill.training.callbacks import AlreadyTrained

    try:
        with contextlib.suppress(AlreadyTrained):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except DuetError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ConfigurationError(
                f"out of memory at step {trainer.state.global_step + 1} with {config.batch_size} "
                f"queries in {config.gradient_accumulation_steps} micro-batches; give more "
                "--gradient-accumulation-steps (the result stays the same), "
                "--gradient-checkpointing, --lora-rank or --dtype bfloat16"
            ) from error
        frames = traceback.extract_tb(error.__traceback__)
        if config.trainer_args and any(frame.name.startswith(_MAKES) for frame in frames):
            raise ConfigurationError(
                f"the Trainer refuses these settings: {first_line(error)}"
            ) from error
        # A torn file makes its reader raise anything; other errors say nothing of the file.
        reading = any(frame.name.startswith(_READS) for frame in frames)
        if checkpoint is not None and reading and not trainer.schedule.begun:
            raise _DamagedCheckpointError(first_line(error)) from error
        raise


def _make_trainer(
    job: Job, args: "TrainingArguments", callbacks: "list[TrainerCallback]"
) -> "tuple[DuetTrainer, Trained]":
    """Load the student for a trainer, and say what of it is trained.

    Raises:
        ConfigurationError: The memory does not hold it, or nothing of it is meant.
        DataError: Its weights cannot be loaded.
    """
    from duet_unlearn.distill.training.trainer import DuetTrainer

    config, folder = job.config, job.student.folder
    model, trained = select_trained(load_model(folder, dtype=config.dtype, trainable=True), config)
    try:
        trainer = DuetTrainer(  # moves it to its device
            config=config,
            model=model,
            args=args,
            objective=job.objective,
            callbacks=callbacks,
            held_out=job.held_out,
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise too_large(folder, config.dtype) from error
        raise
    return trainer, trained


def _warn_of_loss(config: RunConfig, result: RunResult) -> None:
    """Log if no step kept enough."""
    if not (config.eval_forget and result.evaluations) or config.checkpoint_selection != "best":
        return
    base = result.evaluations[0]["retain"]
    kept = next(e["retain"] for e in result.evaluations if e["step"] == result.kept_step)
    if kept < base - config.eval_retain_drop:
        logger.warning(
            "no step kept held-out retain recall within %g points of the base's %.1f; the student "
            "has step %d, with %.1f: lower the learning rate or train fewer steps",
            config.eval_retain_drop,
            base,
            result.kept_step,
            kept,
        )
