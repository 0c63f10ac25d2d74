"""Files that appear whole or not at all: temporary name, fsync, rename."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from duet_unlearn.errors import CacheError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Give a temporary path beside `final`; on success fsync it and rename it to `final`.

    On any failure, an interrupt too, the temporary file is removed and `final` is untouched.

    Raises:
        CacheError: The file system is full, read-only or not writable for this user.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(final)
        _fsync(final.parent)
    except OSError as error:
        raise write_error(final, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(final: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        CacheError: The file cannot be written.
    """
    with atomic_path(final) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where they are missing.

    Raises:
        CacheError: The path is a file, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed writers left behind in a folder of ours."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_error(path: Path, error: OSError) -> CacheError:
    """Turn a failed write into one line that says what to do."""
    advice = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EFBIG: "a limit on file sizes is in force; raise it (ulimit -f)",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "no permission to write there; choose another folder",
        errno.EPERM: "no permission to write there; choose another folder",
        errno.ENOTDIR: "a part of the path is a file; choose another folder",
        errno.EEXIST: "a file of that name is in the way; choose another folder",
    }.get(error.errno or 0, f"{error.strerror or error}; check the folder")
    return CacheError(
        f"{path}: cannot write: {advice}, then run the same command again: what is finished is kept"
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
