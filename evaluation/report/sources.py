"""What a report is made from: evaluations, stress tests, students and caches, found in folders."""

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.adapters import LOG_FILE, RUN_FILE
from duet_unlearn.errors import CacheError, DataError
from duet_unlearn.evaluation.results import REPORT_FORMAT, STRESS_TEST_FORMAT
from duet_unlearn.files import holds_cache, named_path

logger = logging.getLogger(__name__)

STRESS_TESTS = {
    "relearning": "relearn",
    "membership": "membership",
    "attacking": "attack",
    "probing": "probe",
}
"""By the key of the rows in its document, the command that makes it."""
_EVALUATION_KEYS = {"scores", "queries", "models", "sets", "attacks", "config"}

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRun:
    """A student's own record: how it was trained, and its log."""

    folder: Path
    run: Document
    log: tuple[Document, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


@dataclass(slots=True)
class Sources:
    """Everything that was found, each once, in the order of the command line."""

    evaluations: list[tuple[str, Document]] = field(default_factory=list)
    """File name and document."""
    stress_tests: dict[str, list[tuple[str, Document]]] = field(default_factory=dict)
    """Of each kind, by the key that holds its rows."""
    students: list[StudentRun] = field(default_factory=list)
    caches: list[Document] = field(default_factory=list)
    """As `duet-cache inspect --json` has them."""

    def student(self, model: str) -> StudentRun | None:
        """Return the record of an evaluated model: at its path, or the one folder of its name."""
        path = named_path(model)
        here = [s for s in self.students if s.folder.resolve() == path.resolve()]
        found = here or [s for s in self.students if s.name == path.name]
        return found[0] if len(found) == 1 else None


def find_sources(paths: Sequence[Path], summarize_cache: Callable[[Path], Document]) -> Sources:
    """Return what lies in folders, in the folders right below them, and in files.

    The students that an evaluation names are found where it says they are.

    Args:
        paths: Folders, or JSON files of `duet-distill eval` and of stress tests.
        summarize_cache: Reads a cache's folder; whoever calls knows caches, this package does not.

    Raises:
        CacheError: A folder that is named holds a damaged cache; one right below it is left out.
        DataError: A path is missing, a file named is neither, or nothing at all is found.
    """
    sources, seen = Sources(), set[Path]()
    for path in paths:
        if not path.is_dir():
            if path.resolve() not in seen:
                _read_document(path, sources, named=True)
            seen.add(path.resolve())
            continue
        for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
            if holds_cache(folder):
                try:
                    sources.caches.append(summarize_cache(folder))
                except CacheError as error:
                    if folder == path:
                        raise
                    logger.warning("%s; left out", error)
                continue
            own = _read_student(folder, sources)
            for file in sorted(folder.glob("*.json")):
                if file.name not in own and file.resolve() not in seen:
                    _read_document(file, sources)
                seen.add(file.resolve())
    for name, document in sources.evaluations:
        with reading(name, "write it again with `duet-distill eval --out`"):
            for row in document["models"]:
                _read_student(named_path(row["model"]), sources)
    if sources == Sources():
        raise DataError(
            f"{', '.join(map(str, paths))}: no evaluation, student or cache there; write one with "
            "`duet-distill eval --out`"
        )
    return sources


@contextlib.contextmanager
def reading(name: str, advice: str) -> Iterator[None]:
    """Say in one line where a document lacks what its format promises.

    Raises:
        DataError: It does.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{name}: damaged, {type(error).__name__} at {error}; {advice}") from error


def _read_document(path: Path, sources: Sources, *, named: bool = False) -> None:
    """Take a file in if it is a result of ours; one that is named has to be."""
    try:
        _take_document(path, sources, named=named)
    except DataError as error:
        if named:
            raise
        logger.warning("%s; left out", error)


def _take_document(path: Path, sources: Sources, *, named: bool) -> None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if not named and isinstance(error, FileNotFoundError | IsADirectoryError):
            return
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON document ({error}); write it again") from error
    keys = value.keys() if isinstance(value, dict) else set()
    if keys >= _EVALUATION_KEYS:
        _check_format(path, "an evaluation", value, REPORT_FORMAT)
        sources.evaluations.append((path.name, value))
    elif "evaluations" not in keys and (found := keys & STRESS_TESTS.keys()):  # no report's own
        _check_format(path, "a stress test", value, STRESS_TEST_FORMAT)
        sources.stress_tests.setdefault(min(found), []).append((path.name, value))
    elif named:
        raise DataError(
            f"{path}: neither an evaluation (format {REPORT_FORMAT}) nor a stress test; name a "
            f"file of `duet-distill eval --out`, or of {', '.join(STRESS_TESTS.values())} --out"
        )


def _check_format(path: Path, what: str, document: Document, expected: int) -> None:
    if (found := document.get("format")) != expected:
        raise DataError(
            f"{path}: {what} of format {str(found)[:40]}, expected {expected}; make it again with "
            "this version"
        )


def _read_student(folder: Path, sources: Sources) -> Collection[str]:
    """Take a student in and return the names of its own files; none where there is no student."""
    for student in sources.students:
        if student.folder.resolve() == folder.resolve():
            return _files_of(student)
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
        log = tuple(json.loads(line) for line in lines if line.strip())
    except (OSError, ValueError):
        return ()
    if not isinstance(run, dict):
        return ()
    sources.students.append(StudentRun(folder=folder, run=run, log=log))
    return _files_of(sources.students[-1])


def _files_of(student: StudentRun) -> Collection[str]:
    listed = student.run.get("files")
    return [RUN_FILE, *(listed if isinstance(listed, list) else ())]
