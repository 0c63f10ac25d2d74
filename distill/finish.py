"""The end of a run: what was trained becomes a student folder, its history beside it."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.models.adapters import add_adapter
from duet_unlearn.data.models.folder import model_name
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.distill.config_file import write_config
from duet_unlearn.distill.job import Job, RunResult
from duet_unlearn.distill.run_folder import LOG_FILE
from duet_unlearn.distill.save import save_model, write_card, write_run_file
from duet_unlearn.distill.views import describe_views
from duet_unlearn.files import write_error
from duet_unlearn.versions import versions

if TYPE_CHECKING:
    from duet_unlearn.distill.trainer import DuetTrainer

# Where the Trainer has TensorBoard write.
_EVENTS = "runs"


def write_model(job: Job, trainer: "DuetTrainer", folder: Path) -> None:
    """Write the weights as they are now as a model folder; every process has to call this.

    Raises:
        CacheError: The folder cannot be written.
    """
    # Gathering a sharded model takes every process; a whole one is saved as it is.
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    shutil.rmtree(folder, ignore_errors=True)
    save_model(model, job.student, folder, dtype=job.config.save_dtype, state=state)


def publish(job: Job, result: RunResult, *, best: Path | None = None) -> None:
    """Write the history beside the staged model and let the student appear; one process does.

    Args:
        job: The run.
        result: What it came to.
        best: The model folder that becomes the student, where it is not staged yet.

    Raises:
        CacheError: A folder cannot be written.
    """
    config, folder, student = job.config, job.folder, job.student
    staged = folder.staged_student
    if best is not None:
        _stage(best, staged)
    if config.merge:
        _merge(job, staged)
    shutil.copyfile(folder.work / LOG_FILE, staged / LOG_FILE)
    if (folder.work / _EVENTS).is_dir():
        shutil.copytree(folder.work / _EVENTS, staged / _EVENTS, dirs_exist_ok=True)
    manifest = job.reader.manifest
    run_file = {
        "config": config.to_json(),
        "identity": folder.identity,
        "cache": {"digest": manifest.digest, "recipe_id": manifest.recipe_id},
        "views": describe_views(job.views),
        "base": {"name": model_name(student.name), "weights": student.weights},
        "versions": versions(lora=config.lora_rank is not None),
        # Where it was made is no one's business; the other paths are as the user gave them.
        "result": {**dataclasses.asdict(result), "out": ""},
    }
    write_run_file(staged, run_file)
    write_config(staged, config, manifest.digest)
    write_card(staged, run_file, manifest.recipe)
    folder.publish()


def _stage(best: Path, staged: Path) -> None:
    """Put the best weights in place without moving them: a run that is killed now needs them."""
    try:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(best, staged, copy_function=_link)
    except OSError as error:  # copytree's own error is one of them
        raise write_error(staged, error) from error


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
    return target


def _merge(job: Job, staged: Path) -> None:
    """Replace a staged adapter by a whole model; the base is loaded anew, whole and unsharded."""
    adapter = staged.with_name("adapter")
    shutil.rmtree(adapter, ignore_errors=True)
    staged.rename(adapter)
    base = load_model(job.student.folder, dtype=job.config.dtype, trainable=True)
    merged: Any = add_adapter(base, adapter)
    save_model(
        merged.merge_and_unload(), job.student, staged, dtype=job.config.save_dtype, state=None
    )
