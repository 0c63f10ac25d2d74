"""`duet-distill run`: fit a student to a teacher cache. Neither vLLM nor the teacher is needed."""

import dataclasses
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duet_unlearn.data.errors import ConfigurationError, MismatchError, StoppedError
from duet_unlearn.data.model_folder import model_name
from duet_unlearn.data.wrappers import Wrapper, load_wrappers
from duet_unlearn.distill.config import AUTO, RunConfig
from duet_unlearn.distill.config_file import write_config
from duet_unlearn.distill.run_folder import LOG_FILE, RunFolder
from duet_unlearn.distill.save import save_model, versions, write_card, write_run_file
from duet_unlearn.distill.student import Student, check_cache_fits, load_weights, open_student
from duet_unlearn.teacher_cache.reader import CacheReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from duet_unlearn.data.prompts import PromptRenderer
    from duet_unlearn.distill.callbacks import StopOnSignal
    from duet_unlearn.distill.sampler import StepSampler
    from duet_unlearn.distill.trainer import DuetTrainer

logger = logging.getLogger(__name__)

SPLITS = ("forget", "retain")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run came to."""

    out: str
    """Folder of the student."""
    queries: dict[str, int]
    """Queries a split."""
    views: int
    """Views that were drawn from."""
    steps: int
    """Optimizer steps from the base to the student."""
    learning_rate: float
    """Peak learning rate."""
    loss: dict[str, list[float]]
    """First and last logged loss a split."""
    seconds: float
    """Wall time of this process's training, start-up and saving left out."""
    hit: bool = False
    """Whether the student was already there and nothing was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """Everything a run resolved to before weights are loaded."""

    config: RunConfig
    """With every `auto` and None replaced."""
    reader: CacheReader
    student: Student
    views: tuple[Wrapper, ...]
    folder: RunFolder


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
    job = _resolve(config)
    if not config.overwrite and (finished := job.folder.finished()) is not None:
        logger.info("%s: already there, trained by this very configuration", job.folder.out)
        return RunResult(**{**finished["result"], "out": str(job.folder.out), "hit": True})
    from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
    from duet_unlearn.distill.arguments import training_arguments
    from duet_unlearn.distill.sampler import epoch_order

    reader = job.reader
    # A remote cache comes in while the model is loaded and trained, in the order of its use.
    reader.prefetch(epoch_order(reader.splits, reader.row_groups, seed=config.seed, epoch=0))
    renderer = PromptRenderer(load_tokenizer(job.student.folder))
    check_cache_fits(job.student, renderer, reader)
    args = training_arguments(job.config, job.folder.work)
    if args.process_index != 0:
        _wait_for_all(args)  # until the first process has made the work folder
        return _train(job, renderer, args)
    with job.folder.lock():
        job.folder.prepare(overwrite=config.overwrite)
        _wait_for_all(args)
        return _train(job, renderer, args)


def _resolve(config: RunConfig) -> _Job:
    reader = CacheReader.open(config.cache)
    recipe = reader.manifest.recipe
    top_k = _at_most(config.top_k, recipe.top_k, "top_k")
    positions = _at_most(config.positions, recipe.positions, "positions")
    _check_splits(reader)
    views = tuple(view for source in config.views for view in load_wrappers(source))
    student = open_student(config.student)
    out = Path(config.out).expanduser().resolve()
    if out == student.folder:
        raise ConfigurationError(
            f"out is {config.out}, the student's own folder; choose another --out"
        )
    resolved = dataclasses.replace(
        config,
        top_k=top_k,
        positions=positions,
        learning_rate=config.resolved_learning_rate(student.hidden_size),
        save_dtype=student.stored_dtype if config.save_dtype == AUTO else config.save_dtype,
    )
    identity = {
        "settings": resolved.identity(),
        "cache": reader.manifest.digest,
        "base": student.weights,
        "views": [[view.name, view.text] for view in views],
    }
    folder = RunFolder(out=out, identity=identity)
    return _Job(config=resolved, reader=reader, student=student, views=views, folder=folder)


def _at_most(wanted: int | None, cached: int, name: str) -> int:
    if wanted is not None and wanted > cached:
        raise ConfigurationError(f"{name} is {wanted}, but the cache holds {cached}; give it less")
    return cached if wanted is None else wanted


def _check_splits(reader: CacheReader) -> None:
    rows = {split: reader.manifest.splits[split].rows for split in SPLITS}
    if not rows["forget"]:
        raise MismatchError(
            f"{reader.folder}: no forget queries in this cache; build it with --forget"
        )
    if not rows["retain"]:
        logger.warning(
            "%s: no retain queries; nothing holds the student's other knowledge in place",
            reader.folder,
        )


def _wait_for_all(args: "TrainingArguments") -> None:
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()


def _train(job: _Job, renderer: "PromptRenderer", args: "TrainingArguments") -> RunResult:
    from duet_unlearn.distill.callbacks import StopOnSignal
    from duet_unlearn.distill.noise import perturb

    config, folder = job.config, job.folder
    stop = StopOnSignal()
    model = load_weights(job.student, config.dtype)
    use_cache = model.config.use_cache
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    elif config.noise_alpha:
        perturb(model, alpha=config.noise_alpha, beta=config.noise_beta, seed=config.seed)
    trainer = _make_trainer(job, model, renderer, stop, args)
    logger.info("learning rate %.3g", config.learning_rate)
    started = time.perf_counter()
    with stop.handling():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        raise StoppedError(
            f"stopped and saved at step {step} of {steps}; run the same command again to go on"
        )
    result = RunResult(
        out=str(folder.out),
        queries={split: job.reader.manifest.splits[split].rows for split in SPLITS},
        views=len(job.views),
        steps=trainer.state.global_step,
        learning_rate=float(config.learning_rate),
        loss=_first_and_last(trainer.state.log_history),
        seconds=round(seconds, 3),
    )
    model.config.use_cache = use_cache  # the Trainer turned it off
    _save(job, trainer, result)
    _wait_for_all(args)
    return result


def _make_trainer(
    job: _Job,
    model: "PreTrainedModel",
    renderer: "PromptRenderer",
    stop: "StopOnSignal",
    args: "TrainingArguments",
) -> "DuetTrainer":
    from duet_unlearn.distill.batches import CacheDataset
    from duet_unlearn.distill.callbacks import LogFile, LogLastStep, Progress
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
            process=index,
            num_processes=num_processes,
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
        callbacks=[LogLastStep(), stop, Progress(), LogFile(job.folder.work / LOG_FILE)],
    )
    stop.trainer = trainer
    return trainer


def _first_and_last(history: list[dict[str, float]]) -> dict[str, list[float]]:
    courses = {split: [h[k] for h in history if (k := f"loss_{split}") in h] for split in SPLITS}
    return {split: [values[0], values[-1]] for split, values in courses.items() if values}


def _save(job: _Job, trainer: "DuetTrainer", result: RunResult) -> None:
    config, folder, student = job.config, job.folder, job.student
    # Gathering a sharded model takes every process; a whole one is saved as it is.
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    staged = folder.staged_student
    shutil.rmtree(staged, ignore_errors=True)
    save_model(model, student.folder, staged, config.save_dtype, state)
    shutil.copyfile(folder.work / LOG_FILE, staged / LOG_FILE)
    manifest = job.reader.manifest
    run_file = {
        "config": config.to_json(),
        "identity": folder.identity,
        "cache": {"digest": manifest.digest, "recipe_id": manifest.recipe_id},
        "base": {"name": model_name(student.name), "weights": student.weights},
        "versions": versions(),
        # Where it was made is no one's business; the other paths are as the user gave them.
        "result": {**dataclasses.asdict(result), "out": ""},
    }
    write_run_file(staged, run_file)
    write_config(staged, config, manifest.digest)
    write_card(staged, run_file, manifest.recipe)
    folder.publish()
