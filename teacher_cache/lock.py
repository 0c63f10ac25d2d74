"""One build a folder: a lock that the operating system drops when its holder dies."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from duet_unlearn.data.errors import CacheError
from duet_unlearn.teacher_cache.files import write_error

LOCK_NAME = ".build.lock"
HOLDER_NAME = ".build.holder"


@contextlib.contextmanager
def build_lock(cache: Path) -> Iterator[None]:
    """Hold a cache folder for one build.

    Raises:
        CacheError: Another live build holds the folder; the message names its process.
    """
    lock = FileLock(cache / LOCK_NAME, timeout=0)
    holder = cache / HOLDER_NAME
    try:
        lock.acquire()
    except Timeout:
        raise CacheError(
            f"{cache}: another build is writing here ({_describe(holder)}); wait for it, or choose "
            "another --out"
        ) from None
    except OSError as error:
        raise write_error(cache / LOCK_NAME, error) from error
    try:
        with contextlib.suppress(OSError):  # only the message to others is lost without it
            holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
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
