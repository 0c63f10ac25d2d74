"""What a run resolved to before any weight is loaded, and what it came to."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duet_unlearn.data.shapes import Shape
from duet_unlearn.distill.config import AUTO, RunConfig
from duet_unlearn.distill.run_folder import RunFolder
from duet_unlearn.distill.student import Student, open_student
from duet_unlearn.distill.views import describe_views, draw_weights, load_views
from duet_unlearn.errors import ConfigurationError, MismatchError
from duet_unlearn.teacher_cache.reader import CacheReader

if TYPE_CHECKING:
    from duet_unlearn.distill.held_out import HeldOut

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
    """Recalls on held-out queries, step 0 first; empty where none were made."""
    learning_rate: float
    """Peak learning rate."""
    loss: dict[str, list[float]]
    """First and last logged loss a split."""
    seconds: float
    """Wall time of this process's training, start-up and saving left out."""
    hit: bool = False
    """Whether the student was already there and nothing was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a run resolved to before weights are loaded."""

    config: RunConfig
    """With every `auto` and None replaced."""
    reader: CacheReader
    student: Student
    views: tuple[Shape, ...]
    held_out: "HeldOut | None"
    folder: RunFolder


def resolve_job(config: RunConfig) -> Job:
    """Open cache, student and views, and replace what the configuration left open.

    Raises:
        ConfigurationError: A setting does not fit the cache or the place of the student.
        DataError: The student or a view file is missing or malformed.
        CacheError: The cache is unfinished or damaged.
        MismatchError: The cache has no forget queries.
    """
    reader = CacheReader.open(config.cache)
    recipe = reader.manifest.recipe
    top_k = _at_most(config.top_k, recipe.top_k, "top_k")
    positions = _at_most(config.positions, recipe.positions, "positions")
    _check_splits(reader)
    views = load_views(config.views)
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
        lora_alpha=config.resolved_lora_alpha(),
        save_dtype=student.stored_dtype if config.save_dtype == AUTO else config.save_dtype,
    )
    held_out = _load_held_out(config) if config.eval_every else None
    weights = draw_weights(views)
    identity = {
        "settings": resolved.identity(),
        "cache": reader.manifest.digest,
        "base": student.weights,
        "views": [[view.name, view.text] for view in views],
        **({} if weights is None else {"view_weights": list(weights)}),
        **({} if held_out is None else {"held_out": held_out.fingerprint}),
    }
    if views:
        logger.info("views: %s", describe_views(views))
    folder = RunFolder(out=out, identity=identity)
    return Job(
        config=resolved,
        reader=reader,
        student=student,
        views=views,
        held_out=held_out,
        folder=folder,
    )


def _load_held_out(config: RunConfig) -> "HeldOut":
    from duet_unlearn.distill.held_out import HeldOut

    return HeldOut(config)


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
            "%s: no retain queries; nothing holds the student's other knowledge in place: on the "
            "demo world all of it that is near the topic was lost (docs/method.md)",
            reader.folder,
        )
