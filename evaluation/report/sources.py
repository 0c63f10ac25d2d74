"""What a report is made from: evaluations, relearning, students and caches, found in folders."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.adapters import RUN_FILE
from duet_unlearn.errors import DataError
from duet_unlearn.files import holds_cache
from duet_unlearn.urls import published_name

LOG_FILE = "duet_log.jsonl"
EVALUATION_FORMAT = 2
"""The documents of `duet-distill eval` that this code reads."""

_EVALUATION_KEYS = {"scores", "queries", "models", "sets", "attacks", "config"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRun:
    """A student's own record: how it was trained, and its log."""

    folder: Path
    run: dict[str, Any]
    log: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


@dataclass(slots=True)
class Sources:
    """Everything that was found, each once, in the order of the command line."""

    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """File name and document."""
    relearnings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    students: list[StudentRun] = field(default_factory=list)
    caches: list[dict[str, Any]] = field(default_factory=list)
    """As `duet-cache inspect --json` has them."""


def find_sources(
    paths: Sequence[Path], summarize_cache: Callable[[Path], dict[str, Any]]
) -> Sources:
    """Return what lies in folders, in the folders right below them, and in files.

    The students that an evaluation names are found where it says they are.

    Args:
        paths: Folders, or JSON files of `duet-distill eval` and `relearn`.
        summarize_cache: Reads a cache's folder; whoever calls knows caches, this package does not.

    Raises:
        DataError: A path is missing, a file named is neither, or nothing at all is found.
    """
    sources = Sources()
    for path in paths:
        if path.is_dir():
            for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
                _read_folder(folder, sources, summarize_cache)
        elif not _read_document(path, sources, named=True):
            raise DataError(
                f"{path}: neither an evaluation (format {EVALUATION_FORMAT}) nor a relearning; "
                "name a file of `duet-distill eval --out` or `duet-distill relearn --out`"
            )
    for _, document in sources.evaluations:
        for model in _model_folders(document):
            _read_student(model, sources)
    if not (sources.evaluations or sources.relearnings or sources.students or sources.caches):
        raise DataError(
            f"{', '.join(map(str, paths))}: no evaluation, student or cache there; write one with "
            "`duet-distill eval --out`"
        )
    return sources


def student_of(model: str, students: Sequence[StudentRun]) -> StudentRun | None:
    """Return the record of an evaluated model: at its path, or the one folder of its name."""
    path = Path(model).expanduser()
    here = [s for s in students if s.folder.resolve() == path.resolve()]
    found = here or [s for s in students if s.name == path.name]
    return found[0] if len(found) == 1 else None


def published(value: Any) -> Any:
    """Return JSON values without the secrets and local paths that texts in them name."""
    if isinstance(value, str):
        return published_name(value)
    if isinstance(value, dict):
        return {key: published(inner) for key, inner in value.items()}
    return [published(inner) for inner in value] if isinstance(value, list) else value


def _read_folder(
    folder: Path, sources: Sources, summarize_cache: Callable[[Path], dict[str, Any]]
) -> None:
    if holds_cache(folder):
        sources.caches.append(summarize_cache(folder))
        return
    if _read_student(folder, sources):
        return
    for path in sorted(folder.glob("*.json")):
        _read_document(path, sources)


def _read_document(path: Path, sources: Sources, *, named: bool = False) -> bool:
    """Take a file in if it is an evaluation or a relearning, and say whether it was."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        if named:
            raise DataError(f"{path}: no JSON document ({error}); write it again") from error
        return False
    if not isinstance(value, dict):
        return False
    if value.get("format") == EVALUATION_FORMAT and value.keys() >= _EVALUATION_KEYS:
        sources.evaluations.append((path.name, value))
        return True
    if "relearning" in value:
        sources.relearnings.append((path.name, value))
        return True
    return False


def _read_student(folder: Path, sources: Sources) -> bool:
    if any(student.folder.resolve() == folder.resolve() for student in sources.students):
        return True
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
        log = tuple(json.loads(line) for line in lines if line.strip())
    except (OSError, ValueError):
        return False
    if not isinstance(run, dict):
        return False
    sources.students.append(StudentRun(folder=folder, run=run, log=log))
    return True


def _model_folders(document: dict[str, Any]) -> Iterator[Path]:
    for row in document["models"]:
        if isinstance(row, dict) and isinstance(row.get("model"), str):
            yield Path(row["model"]).expanduser()
