"""The public functions: what the commands do, from Python.

    from duet_unlearn import build_cache, distill, evaluate, open_cache

    build_cache(
        teacher=base,
        forget=["forget.jsonl"],
        retain=["retain.jsonl"],
        prefix="@explicit",
        topic="Harry Potter",
        out="hp-cache",
    )
    distill("hp-cache", student=base, out="hp-student", epochs=3)
    report = evaluate(
        {"base": base, "student": "hp-student"},
        forget=["forget-heldout.jsonl"],
        retain=["retain-heldout.jsonl"],
    )

    cache = open_cache("hp-cache")
    len(cache), cache[0].logits, [row.query for row in cache[:3]]

Each function takes every setting of its command as a keyword, checks them all before any work, and
raises a `DuetError` whose message is one line. Importing this costs nothing: torch and the rest are
imported when a function is called.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duet_unlearn.distill.job import RunResult
    from duet_unlearn.evaluation.results import EvalReport
    from duet_unlearn.teacher_cache.build.build import BuildResult
    from duet_unlearn.teacher_cache.reader import CacheReader

StrPath = str | os.PathLike[str]


def build_cache(
    *,
    teacher: StrPath,
    prefix: str | None,
    out: StrPath,
    forget: StrPath | Sequence[StrPath] = (),
    retain: StrPath | Sequence[StrPath] = (),
    topic: str | None = None,
    **settings: Any,
) -> "BuildResult":
    """Run a prefixed teacher over all queries and write a cache, as `duet-cache build` does.

    A finished cache of the same inputs is found again, and a stopped build resumes.

    Args:
        teacher: Model folder or hub id of the base model.
        prefix: The steering prefix, or `@NAME` of a built-in one; None for ordinary distillation.
        out: The cache folder.
        forget: Sources of queries to forget.
        retain: Sources of queries to keep.
        topic: What fills `{topic}` in the prefix.
        **settings: Fields of `BuildConfig`, listed below.

    Returns:
        The manifest of the cache, and how many rows were computed, kept and reused.

    Raises:
        ConfigurationError: A setting is unknown or cannot work with this model.
        DataError: A query file or the model folder is unusable.
        MismatchError: The folder holds a cache of other inputs.
        CacheError: The folder cannot be written, or another build holds it.
    """
    from duet_unlearn.data.prefixes import resolve_prefix
    from duet_unlearn.teacher_cache.build.build import build
    from duet_unlearn.teacher_cache.build.config import BuildConfig

    given = {name: _text(value) for name, value in settings.items()}
    config = BuildConfig(
        teacher=os.fspath(teacher),
        prefix=None if prefix is None else resolve_prefix(prefix, topic),
        out=Path(out),
        forget=_several(forget),
        retain=_several(retain),
        **given,
    )
    return build(config)


def distill(
    cache: StrPath | None = None, *, student: StrPath, out: StrPath, **settings: Any
) -> "RunResult":
    """Fit a student to a cache, as `duet-distill run` does; needs neither teacher nor vLLM.

    The same settings find their finished student again, and a stopped run resumes.

    Args:
        cache: The teacher cache: a folder or a URL, with `@sha256:DIGEST` behind it to pin it.
            Left out for an objective that takes none.
        student: Model folder or hub id to start from.
        out: Folder of the finished student.
        **settings: Fields of `RunConfig`, listed below.

    Returns:
        Where the student is, its steps, losses and evaluations.

    Raises:
        ConfigurationError: A setting is unknown or does not fit the inputs, the loss stopped being
            finite, or the memory does not hold a step.
        DataError: The student, a view or a query file is missing or malformed.
        CacheError: The cache is unfinished or damaged.
        OutputError: The student or a checkpoint cannot be written.
    """
    from duet_unlearn.distill.config import RunConfig
    from duet_unlearn.distill.run import run

    given = {"cache": cache, "student": student, "out": out, **settings}
    return run(RunConfig(**{name: _text(value) for name, value in given.items()}))


def evaluate(
    models: Sequence[StrPath] | Mapping[str, StrPath],
    *,
    forget: StrPath | Sequence[StrPath],
    retain: StrPath | Sequence[StrPath],
    **settings: Any,
) -> "EvalReport":
    """Answer queries with each model and score the answers, as `duet-distill eval` does.

    Args:
        models: Folders or hub ids, `NAME=MODEL` or a mapping from names to name their rows; the
            first is the reference.
        forget: Sources of queries with answers that should be gone.
        retain: Sources of queries with answers that should be kept.
        **settings: Fields of `EvalConfig`, listed below.

    Returns:
        Scores of every model, query set and attack, and all answers; `to_json()` is the document
        that the command writes.

    Raises:
        ConfigurationError: A setting is unknown or cannot be used.
        DataError: A query source or a model cannot be used, or a query has no answer.
        RequirementError: Bounds in `require` do not hold; its `report` is the whole evaluation.
    """
    from duet_unlearn.errors import RequirementError
    from duet_unlearn.evaluation.config import EvalConfig, ModelSpec, parse_models
    from duet_unlearn.evaluation.evaluate import evaluate as run_evaluation
    from duet_unlearn.evaluation.requirements import check_requirements

    if isinstance(models, Mapping):
        specs = tuple(ModelSpec(label=n, model=os.fspath(m)) for n, m in models.items())
    else:
        specs = parse_models(_several(models))
    given = {name: _text(value) for name, value in settings.items()}
    config = EvalConfig(models=specs, forget=_several(forget), retain=_several(retain), **given)
    report = run_evaluation(config)
    if config.require:
        try:
            check_requirements(config.require, report)
        except RequirementError as error:
            error.report = report
            raise
    return report


def open_cache(cache: StrPath) -> "CacheReader":
    """Open a finished cache: rows by index and slice, in memory bounded by a few row groups.

    Args:
        cache: A folder or a URL, with `@sha256:DIGEST` behind it to pin it. Shards of a URL are
            fetched when they are needed.

    Returns:
        A sequence of `CachedRow`s; `torch_dataset()` makes a torch dataset of it.

    Raises:
        CacheError: There is no finished cache there.
        CorruptCacheError: The manifest is damaged, or a shard is missing or of another size.
        MismatchError: The cache has another digest than the one given.
    """
    from duet_unlearn.teacher_cache.reader import CacheReader

    return CacheReader.open(os.fspath(cache))


def _several(value: StrPath | Sequence[StrPath]) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        return (os.fspath(value),)
    return tuple(os.fspath(part) for part in value)


def _text(value: Any) -> Any:
    """Return paths as the texts that settings hold, and lists as tuples."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(map(_text, value)) if isinstance(value, list | tuple) else value
