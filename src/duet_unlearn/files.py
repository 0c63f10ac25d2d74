"""Files that appear whole or not at all: temporary name, fsync, rename."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from duet_unlearn.errors import ConfigurationError, DataError, DuetError, OutputError

TEMPORARY_SUFFIX = ".tmp"
CACHE_FORMAT = "duet-teacher-cache"
"""What the manifest of a cache calls its format."""
CLAIM_NAME = ".duet-unlearn"
"""Marks a folder that we made or found empty, until what we wrote into it proves itself."""
LOCK_NAME = ".build.lock"
_CACHE_FILE = r"manifest\.json|README\.md|\d{5,9}-of-\d{5,9}\.parquet"


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Give a temporary path beside `final`; on success fsync it and rename it to `final`.

    On any failure, an interrupt too, the temporary file is removed and `final` is untouched.

    Raises:
        OutputError: The file system is full, read-only or not writable for this user.
    """
    # Process ids repeat on machines that share a folder, and threads of a process share one.
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(16)}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(final)
        fsync(final.parent)
    except OSError as error:
        raise write_error(final, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(final: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_path(final) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where they are missing.

    Raises:
        OutputError: The path is a file, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def read_text(source: str | Path, kind: str, error: type[DuetError] = DataError) -> str:
    """Return the text of a UTF-8 file that a user names, without a byte order mark.

    Args:
        source: The file.
        kind: What is missing where it is not there: `file of prefixes; write one a line`.
        error: What is raised.

    Raises:
        DuetError: As `error` says: the file is missing, unreadable or not UTF-8.
    """
    path = user_path(source)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"{source}: no such {kind}") from None
    except (OSError, UnicodeDecodeError) as caught:
        reason = getattr(caught, "strerror", None) or "not UTF-8"
        raise error(f"{source}: not readable as UTF-8 text ({reason})") from caught


def read_entries(source: str | Path, kind: str) -> list[tuple[int, str]]:
    """Return a text file's lines with their numbers, stripped, without blank ones and `#` comments.

    Raises:
        DataError: As `read_text`.
    """
    lines = enumerate((line.strip() for line in read_text(source, kind).split("\n")), start=1)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def user_path(text: str | Path, what: str = "path") -> Path:
    """Return a path that a user typed, `~` resolved.

    Raises:
        ConfigurationError: It is empty, or names the home of nobody.
    """
    if not str(text).strip():
        raise ConfigurationError(f"{what} is empty; name a folder or a file")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        raise ConfigurationError(
            f"{what} is {str(text)!r}, but there is no user {user[1:]!r} here; check the name, or "
            f"write ./{user} for a folder of that name"
        ) from None


def named_path(text: str) -> Path:
    """Return a path that a document names; `~alice` stays where there is no such user here."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 Path's own raises


def claim_folder(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Make a folder to write into, or take one that is empty or provably ours.

    Whatever else a folder holds belongs to somebody: it is neither overwritten nor deleted. A
    marker file proves a claim until the finished work does, so that what was stopped resumes.

    Args:
        folder: Where to write.
        is_ours: Says of a folder that is not empty whether its content shows that we wrote it.

    Raises:
        ConfigurationError: The folder is a file, holds files of others, or lies inside a cache.
        OutputError: The folder cannot be made.
    """
    refuse_inside_cache(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder}: is a file, expected a folder; choose another place")
    make_folder(folder)
    present = sorted(path.name for path in folder.iterdir())
    if present and CLAIM_NAME not in present and not is_ours(folder):
        raise ConfigurationError(
            f"{folder}: not empty, and nothing in it shows that duet-unlearn wrote it (found "
            f"{present[0]}); choose another folder"
        )
    if not present:
        try:
            # Under its own name at once: somebody else may claim the folder at the same moment.
            (folder / CLAIM_NAME).write_text("duet-unlearn writes into this folder\n")
        except OSError as error:
            raise write_error(folder, error) from error


@contextlib.contextmanager
def claimed_folder(folder: Path, is_ours: Callable[[Path], bool]) -> Iterator[None]:
    """Claim a folder for some work, which leaves nothing if it fails before it wrote anything.

    Raises as `claim_folder` does.
    """
    missing = missing_folders(folder)
    claim_folder(folder, is_ours)
    try:
        yield
    except BaseException:
        found = sorted(folder.rglob("*"), reverse=True)  # what is in a folder before the folder
        if all(path.is_dir() or path.name in (CLAIM_NAME, LOCK_NAME) for path in found) and (
            folder / CLAIM_NAME in found
        ):
            with contextlib.suppress(OSError):
                for path in found:
                    path.rmdir() if path.is_dir() else path.unlink()
        remove_empty(missing)
        raise


def missing_folders(folder: Path) -> list[Path]:
    """Return what of a folder and its parents is not there, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders in order, up to the first that is not empty or not there."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def refuse_inside_cache(folder: Path) -> None:
    """Refuse a folder that lies inside a cache, where nothing but its shards belongs.

    Raises:
        ConfigurationError: It does.
    """
    inside = next((p for p in folder.absolute().parents if holds_cache(p)), None)
    if inside is not None:
        raise ConfigurationError(f"{folder}: lies inside the cache {inside}; choose another place")


def release_claim(folder: Path) -> None:
    """Remove the marker of a claim, once what was written proves itself."""
    with contextlib.suppress(OSError):
        (folder / CLAIM_NAME).unlink(missing_ok=True)


def holds_cache(folder: Path) -> bool:
    """Say whether a folder is a finished cache, or claims to be one."""
    try:
        with (folder / "manifest.json").open("rb") as file:
            return f'"{CACHE_FORMAT}"'.encode() in file.read(4096)
    except OSError:
        return False


def remove_temporary_files(folder: Path, names: str = _CACHE_FILE) -> None:
    """Remove what killed writers of ours left behind: `.NAME.HEX.tmp` beside a name we write.

    Args:
        folder: Where to look.
        names: A regular expression of the names; those of a cache's files unless given.
    """
    leftover = re.compile(rf"\.({names})\.(\d+|[0-9a-f]{{32}}){re.escape(TEMPORARY_SUFFIX)}")
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if leftover.fullmatch(path.name):
                path.unlink()


def write_error(path: Path, error: OSError) -> OutputError:
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
    return OutputError(
        f"{path}: cannot write: {advice}, then run the same command again: what is finished is kept"
    )


def fsync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
