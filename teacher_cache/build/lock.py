"""Who may write into a cache folder: one build or merge. The system drops a dead holder's lock."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from duet_unlearn.errors import CacheError
from duet_unlearn.files import write_error

LOCK_NAME = ".build.lock"
PROBE_SECONDS = 1.0
"""How long to wait for a lock whose holder may just be ending."""


@contextlib.contextmanager
def build_lock(cache: Path) -> Iterator[None]:
    """Hold a cache folder for one writer.

    Raises:
        CacheError: A live build holds the folder; the message names its process.
    """
    with _hold(cache / LOCK_NAME) as held_by:
        if held_by:
            raise CacheError(
                f"{cache}: another build is writing here ({held_by}); wait for it, or choose "
                "another --out"
            )
        yield


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


def _describe(holder: Path) -> str:
    try:
        value = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {int(value['pid'])} on {str(value['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"
