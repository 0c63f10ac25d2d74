"""Who may write into a cache folder: one build of all of it, or any number of different parts.

The operating system drops a lock when its holder dies. Whoever comes takes the own lock first and
then looks for locks that exclude it, so that of two who come at once at least one sees the other.
"""

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from duet_unlearn.errors import CacheError
from duet_unlearn.files import write_error
from duet_unlearn.teacher_cache.build.parts import Part

LOCK_NAME = ".build.lock"
PROBE_SECONDS = 1.0
"""How long a lock may seem to be held because others look whether it is."""
_PART_LOCK = re.compile(r"\.part-(\d+)-of-(\d+)\.lock")


@contextlib.contextmanager
def build_lock(cache: Path) -> Iterator[None]:
    """Hold a cache folder for one build of all of it.

    Raises:
        CacheError: A live build, or a part of one, holds the folder; the message names its process.
    """
    with _hold(cache / LOCK_NAME) as held_by:
        if held_by:
            raise CacheError(
                f"{cache}: another build is writing here ({held_by}); wait for it, or choose "
                "another --out"
            )
        _refuse_parts(cache, allowed_count=None)
        yield


@contextlib.contextmanager
def part_lock(cache: Path, part: Part) -> Iterator[None]:
    """Hold one part of a cache folder; other parts of the same count may be held by others.

    Raises:
        CacheError: The same part, a part of another count, or a build of the whole folder is under
            way; the message names its process.
    """
    with _hold(cache / part_name(part, ".lock")) as held_by:
        if held_by:
            raise CacheError(
                f"{cache}: part {part} is being built already ({held_by}); wait for it, or end it"
            )
        if whole := _live_holder(cache / LOCK_NAME):
            raise CacheError(
                f"{cache}: a build of all shards is writing here ({whole}); wait for it, it makes "
                f"part {part} too"
            )
        _refuse_parts(cache, allowed_count=part.count)
        yield


def part_name(part: Part, suffix: str) -> str:
    """Return the name of a file that belongs to a running part."""
    return f".part-{part.number:05d}-of-{part.count:05d}{suffix}"


def _refuse_parts(cache: Path, allowed_count: int | None) -> None:
    """Refuse to go on while a part is under way, other than one of the allowed count."""
    for path in sorted(cache.glob(".part-*.lock")):
        match = _PART_LOCK.fullmatch(path.name)
        if match is None or int(match[2]) == allowed_count:
            continue
        if held_by := _live_holder(path):
            what = f"part {int(match[1])}/{int(match[2])}"
            raise CacheError(
                f"{cache}: {what} is being built here ({held_by}); wait for all parts and run "
                "duet-cache finish, or end them"
            )


@contextlib.contextmanager
def _hold(path: Path) -> Iterator[str]:
    """Take a lock and give an empty text; where it is held, give who holds it."""
    lock, holder = FileLock(path), path.with_suffix(".holder")
    try:
        lock.acquire(timeout=PROBE_SECONDS)
    except Timeout:
        yield _describe(holder)
        return
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with contextlib.suppress(OSError):  # only the message to others is lost without it
            holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield ""
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _live_holder(path: Path) -> str:
    """Return who holds a lock, or an empty text if nobody does."""
    if not path.exists():
        return ""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PROBE_SECONDS)
    except Timeout:
        return _describe(path.with_suffix(".holder"))
    except OSError as error:
        raise write_error(path, error) from error
    lock.release()
    return ""


def remove_part_files(cache: Path) -> None:
    """Remove what the parts of a build left; the caller holds the folder."""
    for path in cache.glob(".part-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _describe(holder: Path) -> str:
    try:
        value = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {int(value['pid'])} on {str(value['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"
