"""Write the finished student: a model folder like any other, with its history beside it."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from duet_unlearn.data.models.adapters import LOG_FILE, RUN_FILE, add_adapter
from duet_unlearn.data.models.folder import SLOW_TOKENIZER_FILES, model_name, read_json
from duet_unlearn.data.models.loading import load_model, no_bars
from duet_unlearn.distill.output.card import write_card
from duet_unlearn.distill.output.run_folder import files_of
from duet_unlearn.errors import OutputError
from duet_unlearn.files import write_error, write_text
from duet_unlearn.urls import published_value
from duet_unlearn.versions import versions

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from duet_unlearn.distill.job import Job, RunResult
    from duet_unlearn.distill.training.trainer import DuetTrainer

CONFIG_FILE = "duet_run.yaml"
# Where the Trainer has TensorBoard write.
_EVENTS = "runs"
# The tokenizer is copied, not saved anew: byte for byte the base's means the same ids, and what a
# newer transformers writes an older one may not read.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
    *SLOW_TOKENIZER_FILES,
)


def write_student(job: "Job", trainer: "DuetTrainer") -> None:
    """Write the weights as they are now as the staged model folder; every process calls this.

    Raises:
        OutputError: The folder cannot be written.
    """
    # Gathering a sharded model takes every process; a whole one is saved as it is.
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    folder = job.folder.staged_student
    shutil.rmtree(folder, ignore_errors=True)
    if not job.config.merge:
        _save(job, model, folder, state)
        return
    # Merging starts from the base as it is stored, whole and unsharded.
    adapter = folder.with_name("adapter")
    shutil.rmtree(adapter, ignore_errors=True)
    _save(job, model, adapter, state)
    base = load_model(job.student.folder, dtype=job.config.dtype, trainable=True)
    merged: Any = add_adapter(base, adapter)
    _save(job, merged.merge_and_unload(), folder)


def publish(job: "Job", result: "RunResult") -> None:
    """Write the history beside the staged model and let the student appear; one process does.

    Raises:
        OutputError: A folder cannot be written.
    """
    config, folder, student = job.config, job.folder, job.student
    staged, story = folder.staged_student, job.objective.story()
    try:
        shutil.copyfile(folder.work / LOG_FILE, staged / LOG_FILE)
        if (folder.work / _EVENTS).is_dir():
            shutil.copytree(folder.work / _EVENTS, staged / _EVENTS, dirs_exist_ok=True)
    except OSError as error:  # copytree's own error is one of them
        raise write_error(staged, error) from error
    settings = published_value(config.to_json())
    run_file = {
        "config": settings,
        "identity": folder.identity,
        "base": {
            "name": model_name(student.name),
            "weights": student.weights,
            "licence": student.licence,
        },
        **story.record,
        "versions": versions(lora=config.lora_rank is not None),
        "result": {**dataclasses.asdict(result), "out": ""},
    }
    _write_config(staged, settings, {**folder.identity, **story.record})
    write_card(staged, run_file, story)
    # With the names of all files, the folder proves later that nothing of others is in it.
    listed = {**run_file, "files": sorted({*files_of(staged), RUN_FILE})}
    write_text(staged / RUN_FILE, json.dumps(listed, indent=2, ensure_ascii=False) + "\n")
    folder.publish(overwrite=config.overwrite)


def _write_config(folder: Path, settings: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Write the settings that make the same student again, caches pinned by their digests."""
    # A file that replaces what it finds is the user's to write.
    kept = {name: value for name, value in settings.items() if name != "overwrite"}
    if "cache" in record:
        kept["cache"] = _pinned(kept["cache"], record["cache"]["digest"])
        kept["replay"] = list(map(_pinned, kept["replay"], record.get("replay", ())))
    if kept["eval_cache"]:
        kept["eval_cache"] = _pinned(kept["eval_cache"], record["held_out"])
    header = (
        "# The settings of this student, `auto` resolved where it is the same on every machine. To "
        f"train it again:\n#   duet-distill run --config {CONFIG_FILE} --out ANOTHER_FOLDER\n"
        "# Absolute paths are cut to their last part: run it beside them, or name them by flags.\n"
    )
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=10_000)
    write_text(folder / CONFIG_FILE, header + text)


def _pinned(cache: str, digest: str) -> str:
    return cache if "@sha256:" in cache else f"{cache}@{digest}"


def _save(
    job: "Job", model: "PreTrainedModel", folder: Path, state: "dict[str, Tensor] | None" = None
) -> None:
    """Write a model folder: weights, configuration, and the base's own tokenizer.

    An adapter (a `PeftModel`) is written as peft's adapter folder, in the dtype it was trained in
    and with the alpha that extrapolates it, a whole model in `save_dtype`. `state` holds gathered
    weights where the model has only a part.

    Raises:
        OutputError: The folder cannot be written.
    """
    from safetensors import SafetensorError

    base = job.student.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with no_bars():
            if hasattr(model, "peft_config"):
                _write_adapter(job, model, folder, state)
            else:
                _write_whole(job, model, folder, state)
        for name in _TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        # safetensors makes its files private; the user's own mask decides, as for the others.
        configuration = next(folder.glob("*config.json"))
        for weights in folder.glob("*.safetensors"):
            weights.chmod(configuration.stat().st_mode)
    except OSError as error:
        raise write_error(folder, error) from error
    except SafetensorError as error:
        raise OutputError(
            f"{folder}: cannot write the weights ({error}); free some space, then run the same "
            "command again: it resumes from the last checkpoint"
        ) from error


def _write_whole(job: "Job", model: Any, folder: Path, state: "dict[str, Tensor] | None") -> None:
    import torch

    stored = getattr(torch, job.config.save_dtype)
    changed = {"dtype": stored}
    if hasattr(model.config, "use_cache"):  # the Trainer turned it off
        base = read_json(job.student.folder / "config.json")
        changed["use_cache"] = base.get("use_cache", type(model.config)().use_cache)
    kept = {name: getattr(model.config, name) for name in changed}
    state = _stored(model.state_dict() if state is None else state, stored)
    try:
        model.save_pretrained(folder, state_dict=state)
        # That wrote the dtype of the model in memory into config.json.
        for name, value in changed.items():
            setattr(model.config, name, value)
        model.config.save_pretrained(folder)
    finally:
        for name, value in kept.items():
            setattr(model.config, name, value)


def _stored(state: "dict[str, Tensor]", dtype: "torch.dtype") -> "dict[str, Tensor]":
    """Return the weights in main memory in the dtype they are stored in; what is tied stays so."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        same = (tensor.data_ptr(), tensor.shape)
        if same not in cast:
            cast[same] = tensor.detach().to("cpu", dtype)
        stored[name] = cast[same]
    return stored


def _write_adapter(job: "Job", model: Any, folder: Path, state: "dict[str, Tensor] | None") -> None:
    settings = model.peft_config["default"]
    kept = settings.base_model_name_or_path, settings.lora_alpha
    settings.lora_alpha *= job.config.lora_extrapolation
    settings.base_model_name_or_path = job.student.name  # and not where it lies on this machine
    try:
        # The embeddings are the base's; to decide that by itself, peft would ask the hub.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    finally:
        settings.base_model_name_or_path, settings.lora_alpha = kept
