"""Where a run keeps its state, and how a finished student appears.

A run works in `OUT.unfinished`, beside OUT, and renames the finished student to OUT as its last
act: OUT is either absent or a complete model folder, and what lies in the work folder can never
be taken for one. A work folder of the same run is resumed, any other is refused. Nothing is ever
removed but what its own record proves to be ours: a student whose `duet_run.json` names all its
files, a work folder with an identity in it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from duet_unlearn.data.models.adapters import LOG_FILE, RUN_FILE
from duet_unlearn.errors import ConfigurationError, OutputError
from duet_unlearn.files import (
    make_folder,
    missing_folders,
    refuse_inside_cache,
    remove_empty,
    write_error,
    write_text,
)

WORK_SUFFIX = ".unfinished"
_IDENTITY_FILE = "identity.json"
_STUDENT_FOLDER = "student"
_TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = "checkpoint-"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """The work folder of one run and the place of its student."""

    out: Path
    identity: dict[str, Any]
    """Everything that decides the student; a run resumes only where it is equal."""

    @property
    def work(self) -> Path:
        """The folder of the unfinished run."""
        return self.out.with_name(self.out.name + WORK_SUFFIX)

    @property
    def staged_student(self) -> Path:
        """Where the student is written before it is renamed."""
        return self.work / _STUDENT_FOLDER

    def finished(self) -> dict[str, Any] | None:
        """Return the run file of this very run if its student is already there."""
        run = _read_object(self.out / RUN_FILE)
        return run if run is not None and run.get("identity") == self.identity else None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run away from the work folder; the lock dies with its process.

        Raises:
            ConfigurationError: Another run holds it.
            OutputError: The folder cannot be written.
        """
        missing = missing_folders(self.out.parent)
        make_folder(self.out.parent)
        lock = FileLock(self.work.with_suffix(self.work.suffix + ".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigurationError(
                f"{self.out}: another run is working toward this folder; wait for it, or choose "
                "another --out"
            ) from None
        except OSError as error:
            raise write_error(self.out, error) from error
        try:
            yield
        except BaseException:
            # Refused before its first step, it leaves nothing.
            log = self.work / LOG_FILE
            files = {path.name for path in self.work.glob("*")}
            empty = not log.is_file() or log.stat().st_size == 0
            if _IDENTITY_FILE in files <= {_IDENTITY_FILE, LOG_FILE} and empty:
                shutil.rmtree(self.work, ignore_errors=True)
            raise
        finally:
            # While it is held: a lock on a file that is gone counts for nobody.
            with contextlib.suppress(OSError):  # Windows removes no open file
                Path(lock.lock_file).unlink()
            lock.release()
            remove_empty(missing)

    def prepare(self, *, overwrite: bool) -> None:
        """Make the work folder, or take over the one an interrupted run left.

        Raises:
            ConfigurationError: OUT is no place for a student or holds something else, or the work
                folder another run.
            OutputError: The folder cannot be written.
        """
        refuse_inside_cache(self.out)
        self._refuse_foreign(overwrite=overwrite)
        found = _read_object(self.work / _IDENTITY_FILE)
        if self.work.exists() and found != self.identity:
            shutil.rmtree(self.work)
        make_folder(self.work)
        write_text(self.work / _IDENTITY_FILE, json.dumps(self.identity, indent=2) + "\n")

    def _refuse_foreign(self, *, overwrite: bool) -> None:
        if os.path.ismount(self.out):
            raise ConfigurationError(
                f"{self.out}: is a mount point, which no finished student can be renamed to; "
                "choose a folder inside it as --out"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ConfigurationError(f"{self.out}: is a file; choose another --out")
        if self.out.is_dir() and any(self.out.iterdir()):
            if strange := foreign_file(self.out):
                raise ConfigurationError(
                    f"{self.out}: holds files that are no student of ours ({strange}); choose "
                    "another --out"
                )
            if not overwrite:
                run = _read_object(self.out / RUN_FILE) or {}
                raise ConfigurationError(
                    f"{self.out}: holds the student of another run"
                    f"{_differences(run.get('identity'), self.identity)}; choose another --out, or "
                    "replace it with --overwrite"
                )
        found = _read_object(self.work / _IDENTITY_FILE)
        empty = not self.work.exists() or not any(self.work.iterdir())
        if not empty and not _is_identity(found):
            raise ConfigurationError(
                f"{self.work}: holds files that are no unfinished run; move them away"
            )
        # Without a checkpoint there is nothing to lose: a run that failed early, say.
        if found != self.identity and self.last_checkpoint() is not None and not overwrite:
            raise ConfigurationError(
                f"{self.work}: is the unfinished state of another run"
                f"{_differences(found, self.identity)}; run that one to its end, or discard it "
                "with --overwrite"
            )

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint; the Trainer writes its state file last."""
        complete = [
            (int(number), path)
            for path in self.work.glob(f"{_CHECKPOINT}*")
            if (number := path.name.removeprefix(_CHECKPOINT)).isdigit()
            and _read_object(path / _TRAINER_STATE) is not None
        ]
        return max(complete)[1] if complete else None

    def set_aside(self, checkpoint: Path) -> None:
        """Keep a damaged checkpoint from being taken again; it goes with the work folder."""
        with contextlib.suppress(OSError):
            checkpoint.rename(checkpoint.with_name(f"damaged-{checkpoint.name}"))

    def publish(self, *, overwrite: bool) -> None:
        """Rename the staged student to OUT and remove the work folder.

        Args:
            overwrite: Whether another run's student at OUT is replaced.

        Raises:
            OutputError: The folder cannot be written, or something has appeared at OUT that this
                run may not replace; the student stays where it is, and the same command tries
                again.
        """
        try:
            if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
                if strange := foreign_file(self.out):
                    raise OutputError(
                        f"{self.out}: files of others appeared there while training ({strange}); "
                        f"the student is in {self.staged_student}: move one of them away, then run "
                        "the same command again"
                    )
                if not overwrite and self.finished() is None:
                    raise OutputError(
                        f"{self.out}: another run's student appeared there while training; the "
                        f"student of this run is in {self.staged_student}: move one of them away "
                        "and run the same command again, or add --overwrite to it"
                    )
                # Out of the way first: a folder cannot be replaced by a rename.
                self.out.rename(self.work / "replaced")
            self.staged_student.rename(self.out)
            shutil.rmtree(self.work)
        except OSError as error:
            raise write_error(self.out, error) from error


def foreign_file(folder: Path) -> str | None:
    """Return a file in a folder that no record shows to be ours, or None if all of it is.

    The record of a student is its run file: it parses, has the identity of a run, and lists the
    names of all files.
    """
    if not folder.is_dir() or folder.is_symlink():
        return folder.name
    run = _read_object(folder / RUN_FILE)
    listed = run.get("files") if run and _is_identity(run.get("identity")) else None
    ours = {RUN_FILE, *listed} if isinstance(listed, list) else set()
    return next((name for name in files_of(folder) if name not in ours), None)


def files_of(folder: Path) -> list[str]:
    """Return the names of all files in a folder, those in folders of it too, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink() or not any(path.iterdir())
    )


def _is_identity(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("settings"), dict) and "base" in value


def _differences(found: object, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return ""
    flat_found, flat_wanted = _flat(found), _flat(wanted)
    names = [
        f"{name} is {flat_found.get(name)!r}, now {flat_wanted.get(name)!r}"
        for name in sorted(flat_found.keys() | flat_wanted.keys())
        if flat_found.get(name) != flat_wanted.get(name)
    ]
    return f" ({'; '.join(names[:4])})" if names else ""


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    settings = identity.get("settings")
    rest = {name: value for name, value in identity.items() if name != "settings"}
    return {**rest, **(settings if isinstance(settings, dict) else {})}


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
