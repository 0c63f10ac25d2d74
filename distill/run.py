"""`duet-distill run`: fit a student to a teacher cache. Neither vLLM nor the teacher is needed."""

import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.finish import publish, write_model
from duet_unlearn.distill.job import SPLITS, Job, RunResult, resolve_job
from duet_unlearn.distill.run_folder import LOG_FILE
from duet_unlearn.distill.student import check_cache_fits
from duet_unlearn.distill.trainable import select_trained
from duet_unlearn.distill.views import draw_weights
from duet_unlearn.errors import StoppedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from duet_unlearn.data.prompts import PromptRenderer
    from duet_unlearn.distill.callbacks import StopOnSignal
    from duet_unlearn.distill.evaluation_callback import Watch
    from duet_unlearn.distill.sampler import StepSampler
    from duet_unlearn.distill.trainer import DuetTrainer

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> RunResult:
    """Train the student and leave it at `config.out`.

    The same configuration finds its finished student again, and goes on from the last checkpoint
    of an interrupted run.

    Raises:
        ConfigurationError: A setting does not fit the cache or the place of the student, or the
            loss stopped being finite.
        DataError: The student or a view file is missing or malformed.
        CacheError: The cache is unfinished or damaged, or the student cannot be written.
        MismatchError: The cache's tokens are not the student's.
        StoppedError: A signal stopped it after saving a checkpoint.
    """
    job = resolve_job(config)
    if not config.overwrite and (finished := job.folder.finished()) is not None:
        logger.info("%s: already there, trained by this very configuration", job.folder.out)
        return RunResult(**{**finished["result"], "out": str(job.folder.out), "hit": True})
    from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
    from duet_unlearn.distill.arguments import training_arguments

    reader = job.reader
    tokenizer = load_tokenizer(job.student.folder)
    renderer = PromptRenderer(tokenizer)
    check_cache_fits(job.student, renderer, reader)
    if job.held_out is not None:
        job.held_out.prepare(job.student, renderer, tokenizer)
        job.held_out.warn_of_trained(reader)
    args = training_arguments(job.config, job.folder.work)
    if args.process_index != 0:
        _wait_for_all(args)  # until the first process has made the work folder
        return _train(job, renderer, args)
    with job.folder.lock():
        job.folder.prepare(overwrite=config.overwrite)
        _wait_for_all(args)
        return _train(job, renderer, args)


def _wait_for_all(args: "TrainingArguments") -> None:
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()


def _train(job: Job, renderer: "PromptRenderer", args: "TrainingArguments") -> RunResult:
    from duet_unlearn.distill.callbacks import AlreadyTrained, StopOnSignal
    from duet_unlearn.distill.evaluation_callback import evaluations_of
    from duet_unlearn.distill.noise import perturb

    config, folder = job.config, job.folder
    stop = StopOnSignal()
    base = load_model(job.student.folder, dtype=config.dtype, trainable=True)
    model, trained = select_trained(base, config)
    trainer, watch = _make_trainer(job, model, renderer, stop, args)
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    elif watch is not None:
        watch.measure_base()
    if checkpoint is None and config.noise_alpha:
        perturb(model, alpha=config.noise_alpha, beta=config.noise_beta, seed=config.seed)
    logger.info("learning rate %.3g", config.learning_rate)
    started = time.perf_counter()
    with stop.handling(), contextlib.suppress(AlreadyTrained):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    step, steps, history = (
        trainer.state.global_step,
        trainer.state.max_steps,
        trainer.state.log_history,
    )
    if step < steps and not (watch is not None and watch.may_stop(history)):
        raise StoppedError(
            f"stopped and saved at step {step} of {steps}; run the same command again to go on"
        )
    kept_step = step if watch is None else watch.chosen(history).step
    trainer.check_weights()
    result = RunResult(
        out=str(folder.out),
        queries={split: job.reader.manifest.splits[split].rows for split in SPLITS},
        views=len(job.views),
        trained=trained.what,
        trained_parameters=trained.parameters,
        parameters=trained.of,
        steps=step,
        kept_step=kept_step,
        evaluations=[dataclasses.asdict(found) for found in evaluations_of(history)],
        learning_rate=float(config.learning_rate),
        loss=_first_and_last(history),
        seconds=round(seconds, 3),
    )
    best = None
    if watch is None or config.keep == "last":
        write_model(job, trainer, folder.staged_student)
    else:
        watch.warn_of_loss(history)
        best = watch.best_folder(kept_step)
    if trainer.is_world_process_zero():
        publish(job, result, best=best)
    _wait_for_all(args)
    return result


def _make_trainer(
    job: Job,
    model: "PreTrainedModel",
    renderer: "PromptRenderer",
    stop: "StopOnSignal",
    args: "TrainingArguments",
) -> "tuple[DuetTrainer, Watch | None]":
    from duet_unlearn.distill.callbacks import LogFile, LogLastStep, Progress, StopIfDone
    from duet_unlearn.distill.dataset import CacheDataset
    from duet_unlearn.distill.evaluation_callback import Watch
    from duet_unlearn.distill.losses import Loss
    from duet_unlearn.distill.sampler import StepSampler
    from duet_unlearn.distill.trainer import DuetTrainer

    config, reader = job.config, job.reader

    def make_sampler(index: int, num_processes: int) -> "StepSampler":
        return StepSampler(
            reader.splits,
            reader.row_groups,
            seed=config.seed,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            num_views=len(job.views),
            view_weights=draw_weights(job.views),
            process=index,
            num_processes=num_processes,
        )

    watch = None
    if job.held_out is not None:
        watch = Watch(
            config, job.held_out, job.folder.work, lambda to: write_model(job, trainer, to)
        )
    trainer = DuetTrainer(
        model=model,
        args=args,
        dataset=CacheDataset(
            reader,
            top_k=config.top_k,
            positions=config.positions,
            views=job.views,
            render=renderer.student_ids,
            max_length=job.student.max_length,
        ),
        make_sampler=make_sampler,
        loss=Loss(name=config.loss, delta=config.delta, temperature=config.temperature),
        callbacks=[
            StopIfDone(watch.may_stop if watch else None),
            LogLastStep(),
            stop,
            Progress(),
            LogFile(job.folder.work / LOG_FILE),
            *([watch] if watch else []),
        ],
    )
    stop.trainer = trainer
    if watch is not None:
        watch.trainer = trainer
    return trainer, watch


def _first_and_last(history: list[dict[str, float]]) -> dict[str, list[float]]:
    courses = {split: [h[k] for h in history if (k := f"loss_{split}") in h] for split in SPLITS}
    return {split: [values[0], values[-1]] for split, values in courses.items() if values}
