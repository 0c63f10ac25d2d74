"""Who may write into a cache folder: one build or merge. The system drops a dead holder's lock."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from duet_unlearn.errors import CacheError
from duet_unlearn.files import LOCK_NAME, write_error

PROBE_SECONDS = 1.0
"""How long to wait for a lock whose holder may just be ending."""
_HOLDER_LENGTH = 120


@contextlib.contextmanager
def build_lock(cache: Path) -> Iterator[None]:
    """Hold a cache folder for one writer.

    Raises:
        CacheError: A live build holds the folder; the message names its process.
    """
    path = cache / LOCK_NAME
    lock, holder = FileLock(path), path.with_suffix(".holder")
    try:
        lock.acquire(timeout=PROBE_SECONDS)
    except Timeout:
        held_by = "process unknown"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            held_by = holder.read_text(encoding="utf-8")[:_HOLDER_LENGTH]
        raise CacheError(
            f"{cache}: another build is writing here ({held_by}); wait for it, or choose another "
            "--out"
        ) from None
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with contextlib.suppress(OSError):  # only the message to others is lost without it
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()
