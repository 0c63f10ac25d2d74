"""What a run takes before any of it runs: memory, disk and, from a few real steps, time.

Counted from the configuration alone, on a model whose tensors have shapes and no numbers: what
autograd keeps of a forward pass is found by running that pass on them. So a model is planned for
without its weights; only the measured part needs them.
"""

import dataclasses
import logging
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.models.folder import resolve_model_folder, weight_files
from duet_unlearn.data.models.loading import hush_libraries
from duet_unlearn.distill.batches.sampler import PLAIN, StepSampler, sampler_of
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.job import peak_memory, resolve_config
from duet_unlearn.distill.model.activations import Lengths, activations
from duet_unlearn.distill.model.student import Student, describe_student
from duet_unlearn.distill.model.trainable import Trained, select_trained
from duet_unlearn.distill.objectives.base import Objective, open_objective
from duet_unlearn.distill.plan_config import PlanConfig
from duet_unlearn.errors import ConfigurationError, DataError, first_line
from duet_unlearn.files import user_path
from duet_unlearn.settings import fields
from duet_unlearn.teacher_cache.reader import CacheReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

logger = logging.getLogger(__name__)

# Steps of the first epoch whose batches are looked at.
_LOOKED_AT = 256
# AdamW holds two numbers for each that is trained.
_ADAM_STATES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a few real steps in a process of their own came to."""

    steps: int
    """That were timed, after those that warm up."""
    step_seconds: float
    """Median of a step."""
    start_up_seconds: float
    """Everything but steps at that pace: imports, loading, warming up, writing the student."""
    run_seconds: float
    """Start-up and all steps of the planned run; its evaluations and checkpoints are left out."""
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run is expected to take; sizes in bytes."""

    student: str
    cache: str | None
    trained: str
    """What of the student is trained."""
    trained_parameters: int
    parameters: int
    dtype: str
    """How weights are held."""
    precision: str
    """Arithmetic of the forward pass on this machine."""
    device: str
    queries: dict[str, int]
    sequences_per_epoch: int
    """Sequences that pass the student; two for each query that has a view to be drawn in."""
    epochs: int
    steps_per_epoch: int
    steps: int
    longest_batch: tuple[int, int]
    """Rows and tokens each of the largest forward pass, padding included; a tree is one row."""
    memory: dict[str, int]
    """Estimated, one process: weights, gradients, optimizer, activations, process and their sum."""
    disk: dict[str, int]
    """Estimated: student, checkpoints, and the most that both take at one time."""
    build: dict[str, int]
    """Estimated, of a cache's build with a teacher of this architecture; empty without a cache."""
    measured: Measured | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dataclasses.asdict(self)


def plan(config: PlanConfig) -> Plan:
    """Say what a run with these settings takes on this machine.

    Raises:
        ConfigurationError: A setting does not fit the inputs, or the memory does not hold a step.
        DataError: The student is missing or not a model that transformers knows.
        CacheError: The cache is unfinished or damaged.
        MismatchError: The cache's tokens are not the student's.
    """
    from duet_unlearn.distill.model.token_tree import may_merge
    from duet_unlearn.distill.training.arguments import training_arguments

    student = _find_student(config.student)
    objective = open_objective(config, student)
    job = resolve_config(config, student, objective)
    notes = _prepare(objective, student, job)
    with tempfile.TemporaryDirectory() as scratch:
        args = training_arguments(job, Path(scratch))
    sampler = sampler_of(objective.order, job)
    if sampler.steps_per_epoch > _LOOKED_AT:
        notes.append(f"lengths are those of the first {_LOOKED_AT} steps")
    model, trained = _without_numbers(student, job)
    lengths = _look(objective, sampler, in_trees=may_merge(model))
    reader: CacheReader | None = getattr(objective, "reader", None)
    epochs = int(job.epochs)
    steps = job.max_steps or epochs * sampler.steps_per_epoch
    return Plan(
        student=student.name,
        cache=config.cache,
        trained=trained.what,
        trained_parameters=trained.parameters,
        parameters=trained.of,
        dtype=job.dtype,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else job.dtype,
        device=str(args.device),
        queries=objective.order.counts,
        sequences_per_epoch=objective.order.num_sequences,
        epochs=epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        steps=steps,
        longest_batch=(lengths.rows, lengths.tokens),
        memory=_memory(model, job, args, lengths, notes),
        disk=_disk(model, job, args, steps),
        build={} if reader is None else _build(model, reader, lengths),
        measured=_measure(config, student, steps, notes),
        notes=tuple(notes),
    )


def _find_student(model: str) -> Student:
    """Describe the student by its configuration; a folder may have nothing else."""
    folder = user_path(model, "student")
    if not (folder / "config.json").is_file():
        folder = resolve_model_folder(model, need_weights=False)
    return describe_student(model, folder.resolve(), weights="")


def _prepare(objective: Objective, student: Student, config: RunConfig) -> list[str]:
    """Check the inputs against the student as a run does; return what could not be checked."""
    try:
        resolve_model_folder(student.folder, need_weights=False)
    except DataError:
        if objective.order.num_views or config.objective != "duet":
            raise  # its queries are tokenised by the student
        return ["the student has no tokenizer there: whether the cache fits it is not checked"]
    from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer

    objective.prepare(PromptRenderer(load_tokenizer(student.folder)))
    return []


def _look(objective: Objective, sampler: StepSampler, *, in_trees: bool) -> Lengths:
    from duet_unlearn.distill.model.token_tree import merge

    dataset, shapes, scored, longest = objective.dataset, [(0, 0)], 0, 0
    for _, draws in zip(range(_LOOKED_AT * sampler.accumulation), sampler, strict=False):
        examples = [dataset[draw] for draw in draws]
        batch = objective.collate(examples)
        tree = merge(batch) if in_trees else None
        shapes.append(tuple((batch["input_ids"] if tree is None else tree.input_ids).shape))
        scored = max(scored, int(batch["position_mask"].sum()))
        # A micro-batch may hold views alone.
        plain = [e for e, draw in zip(examples, draws, strict=True) if draw.view == PLAIN]
        longest = max([longest, *(len(example.prompt_ids) for example in plain)])
    rows, tokens = max(shapes, key=math.prod)
    return Lengths(rows=rows, tokens=tokens, scored=scored, longest_prompt=longest)


def _without_numbers(student: Student, config: RunConfig) -> "tuple[PreTrainedModel, Trained]":
    """Return the model to train with tensors that take no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                AutoConfig.from_pretrained(student.folder), dtype=getattr(torch, config.dtype)
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        reason = first_line(error)
        raise DataError(
            f"model {student.folder}: transformers cannot make it of its config.json ({reason}); "
            "expected a causal language model it knows"
        ) from error
    with torch.device("meta"):
        return select_trained(model, config)


def _memory(
    model: "PreTrainedModel",
    config: RunConfig,
    args: "TrainingArguments",
    lengths: Lengths,
    notes: list[str],
) -> dict[str, int]:
    """Return the bytes that one process holds at its peak."""
    gradients = _bytes(model, trained_only=True)
    memory = {"weights": _bytes(model), "gradients": gradients}
    memory["optimizer"] = _ADAM_STATES * gradients
    if not str(getattr(args.optim, "value", args.optim)).startswith("adamw_torch"):
        notes.append(f"optimizer {args.optim}: counted as AdamW")
    try:
        memory["activations"] = activations(model, config, args, lengths)
    except Exception as error:  # a model's own code, run on tensors that it may not expect
        notes.append(
            f"activations are missing: they cannot be followed in this model ({first_line(error)})"
        )
    if args.device.type == "cpu":  # the interpreter and its libraries, which this process has too
        memory["process"] = peak_memory()
    return {**memory, "sum": sum(memory.values())}


def _bytes(model: "PreTrainedModel", *, trained_only: bool = False) -> int:
    counted = (p for p in model.parameters() if p.requires_grad or not trained_only)
    return sum(p.nbytes for p in counted)


def _disk(
    model: "PreTrainedModel", config: RunConfig, args: "TrainingArguments", steps: int
) -> dict[str, int]:
    import torch

    trained, whole = _bytes(model, trained_only=True), _bytes(model)
    adapter = config.lora_rank is not None
    student = trained
    if not adapter or config.merge:
        numbers = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
        student = numbers * getattr(torch, config.save_dtype).itemsize
    checkpoint = (trained if adapter else whole) + _ADAM_STATES * trained
    keeps_best = bool(config.eval_steps) and config.checkpoint_selection == "best"
    saves = 0
    if args.save_strategy != "no":  # the last step is saved too
        saves = math.ceil(steps / args.save_steps)
        saves += math.ceil(steps / config.eval_steps) if keeps_best else 0
    # A new one is complete before the oldest goes.
    at_once = min(saves, int(args.save_total_limit or 0) + 1)
    checkpoints = at_once * checkpoint
    return {
        "student": student,
        "checkpoint": checkpoint,
        "checkpoints_at_once": checkpoints,
        "sum": student + checkpoints,
    }


def _build(model: "PreTrainedModel", reader: CacheReader, lengths: Lengths) -> dict[str, int]:
    """Return what building this cache takes with a teacher like the student."""
    import torch

    manifest, text = reader.manifest, model.config.get_text_config()
    recipe = manifest.recipe
    size = getattr(torch, recipe.compute_dtype).itemsize
    numbers = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    # A recurrent state has none, and no keys and values.
    queries = getattr(text, "num_attention_heads", 0)
    heads = getattr(text, "num_key_value_heads", None) or queries
    width = getattr(text, "head_dim", None) or text.hidden_size // max(queries, 1)
    # No token is shorter than a byte.
    tokens = lengths.longest_prompt + recipe.positions + len(recipe.prefix.encode())
    return {
        "weights": numbers * size,
        "kv_cache_per_query": 2 * text.num_hidden_layers * heads * width * size * tokens,
        "cache": manifest.num_bytes,
        "cache_per_query": -(-manifest.num_bytes // manifest.num_rows),
    }


def _measure(config: PlanConfig, student: Student, steps: int, notes: list[str]) -> Measured | None:
    """Train a few steps in a process of its own, and leave nothing behind."""
    from duet_unlearn.distill.run import run
    from duet_unlearn.distill.training.callbacks import WARM_UP_STEPS

    if not config.measure:
        return None
    if not weight_files(student.folder):
        notes.append("nothing is measured: the weights are not there")
        return None
    if config.eval_steps:
        notes.append("the time of evaluations is not in that of the run")
    of_run = {
        name: getattr(config, name)
        for name in fields(RunConfig)
        if not name.startswith(("eval_", "early_", "checkpoint_"))
    }
    count = min(config.measure + WARM_UP_STEPS, steps)
    logger.info("measuring: %d steps", count)
    with tempfile.TemporaryDirectory(prefix="duet-plan-") as scratch:
        short = RunConfig(
            **{
                **of_run,
                "out": str(Path(scratch) / "student"),
                "max_steps": count,
                "save_steps": 0,
                "report_to": "none",
            }
        )
        started = time.perf_counter()
        try:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn, initializer=hush_libraries) as pool:
                result = pool.submit(run, short).result()
        except BrokenProcessPool as error:
            raise ConfigurationError(
                "the process that tried a step was killed, as it is when memory runs out; give "
                "--measure 0 for the estimates alone"
            ) from error
        seconds = time.perf_counter() - started
    start_up = max(seconds - count * result.step_seconds, 0.0)
    return Measured(
        steps=max(count - WARM_UP_STEPS, 1),
        step_seconds=result.step_seconds,
        start_up_seconds=round(start_up, 3),
        run_seconds=round(start_up + steps * result.step_seconds, 3),
        peak_memory_bytes=result.peak_memory_bytes,
    )
