"""What a run resolved to before any weight is loaded, and what it came to."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from duet_unlearn.data.models.loading import fastest_dtype
from duet_unlearn.distill.auto import resolve_auto
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import Student, open_student
from duet_unlearn.distill.objectives.base import Objective, open_objective
from duet_unlearn.distill.output.run_folder import RunFolder
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.files import user_path
from duet_unlearn.urls import published_value

if TYPE_CHECKING:
    from duet_unlearn.distill.objectives.duet import Duet
    from duet_unlearn.distill.training.held_out import HeldOut
    from duet_unlearn.distill.training.held_out_rows import HeldOutRows


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run came to."""

    out: str
    """Folder of the student."""
    queries: dict[str, int]
    """Queries a split."""
    views: int
    """Views that were drawn from."""
    trained: str
    """What of the student was trained."""
    trained_parameters: int
    """Numbers that training changed."""
    parameters: int
    """Numbers of the whole student."""
    steps: int
    """Optimizer steps that were done."""
    kept_step: int
    """The step whose weights the student has."""
    evaluations: list[dict[str, float]]
    """Recalls on held-out queries or losses on held-out rows, step 0 first; empty without."""
    learning_rate: float
    """Peak learning rate."""
    loss: dict[str, list[float]]
    """First and last logged loss a split."""
    seconds: float
    """Wall time of this process's training, start-up and saving left out."""
    step_seconds: float = 0.0
    """Median wall time of an optimizer step, without the first two where there are more."""
    peak_memory_bytes: int = 0
    """Most memory that this process held: its GPU's allocator where there is one, else its own."""
    hit: bool = False
    """Whether the student was already there and nothing was done."""


def peak_memory() -> int:
    """Return the most bytes that this process held so far: on the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # The peak of `getrusage` begins, on Linux, with that of the process that started this one.
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a run resolved to before weights are loaded."""

    config: RunConfig
    """With every `auto` and None replaced that the machine does not decide."""
    objective: Objective
    student: Student
    held_out: "HeldOut | HeldOutRows | None"
    folder: RunFolder


def resolve_config(config: RunConfig, student: Student, objective: Objective) -> RunConfig:
    """Return the settings with all replaced that student and inputs decide."""
    return resolve_auto(
        config.replaced(**objective.settings),
        hidden_size=student.hidden_size,
        stored_dtype=student.stored_dtype,
        fast_dtype=fastest_dtype(student.folder),
        rows=sum(objective.order.counts.values()),
        views=objective.order.num_views,
        forgets=bool(objective.order.counts.get("forget")),
    )


def _open_held_out(config: RunConfig, objective: Objective) -> "HeldOut | HeldOutRows":
    from duet_unlearn.distill.training.held_out import HeldOut
    from duet_unlearn.distill.training.held_out_rows import HeldOutRows

    if config.eval_cache is None:
        return HeldOut(config)
    return HeldOutRows(config, cast("Duet", objective))  # no other objective takes a cache


def resolve_job(config: RunConfig) -> Job:
    """Open the inputs and replace what the configuration left open.

    Raises:
        ConfigurationError: A setting does not fit the inputs or the place of the student.
        DataError: The student, a view or a query file is missing or malformed.
        CacheError: The cache is unfinished or damaged.
        MismatchError: The cache has no forget queries.
    """
    out = Path(os.path.realpath(user_path(config.out, "out")))  # a loop of links stays one
    if not out.name or out.is_symlink():
        raise ConfigurationError(
            f"out is {config.out}, where no folder can be; choose another --out"
        )
    student = open_student(config.student)
    if out == student.folder:
        raise ConfigurationError(
            f"out is {config.out}, the student's own folder; choose another --out"
        )
    objective = open_objective(config, student)
    resolved = resolve_config(config, student, objective)
    held_out = _open_held_out(resolved, objective) if config.eval_steps else None
    identity = {
        # It is published beside the student: no password, no path of this machine.
        "settings": published_value(resolved.identity()),
        "base": student.identity,
        **objective.identity,
        **({} if held_out is None else {"held_out": held_out.fingerprint}),
    }
    return Job(
        config=resolved,
        objective=objective,
        student=student,
        held_out=held_out,
        folder=RunFolder(out=out, identity=identity),
    )
