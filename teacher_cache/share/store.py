"""Files below one URL: got with a limit, put whole, listed. Transfer is the libraries' job.

A cache is a handful of names below one URL, so that is all a store knows. A file never takes more
room than the caller allows, because whoever runs the server may lie about sizes.
"""

import contextlib
import errno
import posixpath
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import ConfigurationError, CorruptCacheError, DuetError
from duet_unlearn.files import (
    TEMPORARY_SUFFIX,
    atomic_path,
    make_folder,
    user_path,
    write_error,
)
from duet_unlearn.teacher_cache.share.hub import HubFolder
from duet_unlearn.teacher_cache.share.store_errors import explain, is_missing, is_passing
from duet_unlearn.urls import protocol_of, redact_url

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = ("http", "https")
# These show a file once it is whole; elsewhere a temporary name is renamed.
_WHOLE_OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")
# fsspec's HTTP does not try again by itself, the other libraries do.
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.5


class Store:
    """The files below one URL; names are relative to it.

    Args:
        url: A URL or a local path.

    Raises:
        ConfigurationError: The protocol is unknown or its package is not installed.
        CacheError: The store refuses the connection outright.
    """

    def __init__(self, url: str) -> None:
        self.url = redact_url(url)
        self.protocol = protocol_of(url)
        self.hub = HubFolder.parse(url) if self.protocol == "hf" else None
        self._fs, self._root = _open_filesystem(url, self.protocol)
        self.read_only = self.protocol in _READ_ONLY
        self.folder = Path(self._root) if self.protocol == "file" else None
        """Of a place on this machine."""

    def where(self, name: str) -> str:
        """Return the URL of a file, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def get(self, name: str, to: Path, limit: int) -> None:
        """Bring a file to a local path.

        Raises:
            FileNotFoundError: It is not there.
            CorruptCacheError: It is larger than `limit` bytes.
            CacheError: The store cannot be read.
            OutputError: The disk is full.
        """
        with self._explained(name):
            for attempt in range(_ATTEMPTS if self.read_only else 1):
                try:
                    self._get(name, to, limit)
                    return
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in _DISK_FULL:
                        raise write_error(to, error) from error
                    if attempt == _ATTEMPTS - 1 or not self.read_only or not is_passing(error):
                        raise
                    # Apart by chance, so that clients do not all return at once.
                    time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.75, 1.25))

    def _get(self, name: str, to: Path, limit: int) -> None:
        path = self._path(name)
        count = _Limit(self.where(name), limit)
        if self.protocol == "file":
            if not Path(path).is_file():
                raise FileNotFoundError(path)  # a pipe or a device would hang
            count.relative_update(Path(path).stat().st_size)
            shutil.copyfile(path, to)
        elif self.hub is not None:
            self.hub.get(name, to)
            count.relative_update(to.stat().st_size)
        else:
            options = {"headers": {"Accept-Encoding": "identity"}} if self.read_only else {}
            self._fs.get_file(path, str(to), callback=count, **options)

    @contextlib.contextmanager
    def _copy(self, name: str, limit: int) -> Iterator[Path | None]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path: Path | None = Path(folder) / "file"
            try:
                self.get(name, Path(folder) / "file", limit)
            except FileNotFoundError:
                path = None
            yield path

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file's bytes, or None where there is none; raises as `get` does."""
        with self._copy(name, limit) as path:
            return path.read_bytes() if path else None

    def sha256(self, name: str, limit: int) -> str | None:
        """Read a file back; return `sha256:<hex>` or None as `read` does."""
        if self.folder is not None and (self.folder / name).is_file():
            return sha256_file(self.folder / name)
        with self._copy(name, limit) as path:
            return sha256_file(path) if path else None

    def list(self, folder: str = "") -> dict[str, int | None]:
        """Return name and size of what lies directly in a folder, None as size of a folder.

        Raises:
            CacheError: The store cannot be listed.
        """
        try:
            with self._explained(folder):
                entries = self._fs.ls(self._path(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {
            posixpath.basename(entry["name"].rstrip("/")): (
                None if entry["type"] == "directory" else entry["size"] or 0
            )
            for entry in entries
            # Some tools keep an empty object under the folder's own name.
            if entry["name"].rstrip("/") != self._path(folder).rstrip("/")
        }

    def put(self, path: Path, name: str) -> None:
        """Send a file; it appears under its name only when it is whole.

        Raises:
            CacheError: The store cannot be written.
            OutputError: It is a folder that cannot be written.
        """
        final = self._path(name)
        if self.protocol == "file":
            make_folder(Path(final).parent)
            with atomic_path(Path(final)) as copy:
                shutil.copyfile(path, copy)
            return
        try:
            with self._explained(name):
                if self.protocol in _WHOLE_OBJECTS:
                    self._fs.put_file(str(path), final)
                    return
                folder, base = posixpath.split(final)
                # A name of its own: two may push to one place at the same time.
                temporary = f"{folder}/.{base}.{secrets.token_hex(16)}{TEMPORARY_SUFFIX}"
                self._fs.makedirs(folder, exist_ok=True)
                self._fs.put_file(str(path), temporary)
                self._fs.mv(temporary, final)
        except FileNotFoundError as error:
            raise explain(error.__cause__ or error, self.where(name)) from error

    def ask_hub(self, ask: Callable[[HubFolder], None]) -> None:
        """Have something done to the folder where it is one of the hub.

        Raises:
            CacheError: The hub refuses, or cannot be reached.
        """
        if self.hub is None:
            return
        try:
            with self._explained(""):
                ask(self.hub)
        except FileNotFoundError as error:
            raise explain(error.__cause__ or error, self.url) from error

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what a library raises into FileNotFoundError or one line."""
        try:
            yield
        except DuetError:
            raise
        except Exception as error:
            where = self.where(name)
            raise (FileNotFoundError(where) if is_missing(error) else explain(error, where)) from (
                error
            )


class _Limit(Callback):  # type: ignore[misc] # fsspec has no types
    """Ends a transfer that brings more than it should."""

    def __init__(self, where: str, limit: int) -> None:
        super().__init__()
        self._where, self._limit, self._count = where, limit, 0

    def relative_update(self, inc: int = 1) -> None:
        self._count += inc
        if self._count > self._limit:
            raise CorruptCacheError(
                f"{self._where}: more than {self._limit} bytes; the copy there is damaged"
            )


def _open_filesystem(url: str, protocol: str) -> tuple[Any, str]:
    if protocol == "file":
        path = url.partition("://")[2] or url
        return fsspec.filesystem("file"), str(user_path(path, "the place").absolute())
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        if protocol in _READ_ONLY:
            import aiohttp

            # No limit on the whole transfer: only a connection that stands still is given up.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        filesystem = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        s3 = protocol in ("s3", "s3a")
        advice = "pip install 'duet-unlearn[s3]'" if s3 else str(error).splitlines()[0]
        raise ConfigurationError(
            f"{redact_url(url)}: a package for {protocol}:// is missing; {advice}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(
            f"{redact_url(url)}: unknown protocol {protocol}://; use s3://, hf://, https:// "
            "or a folder"
        ) from error
    except Exception as error:
        raise explain(error, url) from error
    return filesystem, str(filesystem._strip_protocol(url)).rstrip("/")
