"""Files below one URL: got with a limit, put whole, listed. Transfer is the libraries' job.

A file never takes more room than the caller allows, because whoever runs the server may lie about
sizes. What goes wrong becomes one line that says what to do; see `store_errors`.
"""

import contextlib
import errno
import posixpath
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import (
    CacheError,
    ConfigurationError,
    CorruptCacheError,
    DuetError,
    first_line,
)
from duet_unlearn.files import (
    TEMPORARY_SUFFIX,
    atomic_path,
    make_folder,
    user_path,
    write_error,
)
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME
from duet_unlearn.teacher_cache.share.store_errors import explain, is_missing, is_passing
from duet_unlearn.urls import protocol_of, redact_url

_HUB_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# These show a file once it is whole; elsewhere a temporary name is renamed.
_WHOLE_OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")
# fsspec's HTTP does not try again by itself, the other libraries do.
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.5


def parse_hub_url(url: str) -> tuple[str, str | None, str | None]:
    """Split `hf://datasets/ORG/NAME[@REVISION][/FOLDER]` into repository, revision and folder."""
    match = _HUB_URL.fullmatch(url)
    if match is None:
        raise CacheError(f"{url}: expected hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
    repository, revision, folder = match.groups()
    return repository, revision, folder


class Store:
    """The files below one URL; names are relative to it.

    Raises:
        ConfigurationError: The protocol is unknown or its package is not installed.
        CacheError: The store refuses the connection outright.
    """

    def __init__(self, url: str) -> None:
        self.url = redact_url(url)
        self.protocol = protocol_of(url)
        self.read_only = self.protocol in ("http", "https")
        self.hub = parse_hub_url(url) if self.protocol == "hf" else None
        self._fs, self._root = _open_filesystem(url, self.protocol)
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
        attempts = _ATTEMPTS if self.read_only else 1
        with self._explained(name):
            for attempt in range(attempts):
                try:
                    self._get(name, to, limit)
                    return
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in _DISK_FULL:
                        raise write_error(to, error) from error
                    if attempt == attempts - 1 or not is_passing(error):
                        raise
                    # Apart by chance, so that clients do not all return at once.
                    time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.75, 1.25))

    def _get(self, name: str, to: Path, limit: int) -> None:
        path = self._path(name)
        count = _Limit(self.where(name), limit)
        if self.folder is not None:
            if not Path(path).is_file():
                raise FileNotFoundError(path)  # a pipe or a device would hang
            count.relative_update(Path(path).stat().st_size)
            shutil.copyfile(path, to)
        elif self.hub is not None:
            # Without a callback the hub's client resumes by itself and takes its fastest way.
            count.relative_update(self._fs.info(path)["size"] or 0)
            self._fs.get_file(path, str(to))
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
        """Return name and size of what lies directly in a folder, None as size of a folder."""
        path = self._path(folder)
        try:
            with self._explained(folder):
                entries = self._fs.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {
            posixpath.basename(entry["name"].rstrip("/")): (
                None if self._is_folder(entry) else entry["size"] or 0
            )
            for entry in entries
            # Some tools keep an empty object under the folder's own name.
            if entry["name"].rstrip("/") != path.rstrip("/")
        }

    def _is_folder(self, entry: dict[str, Any]) -> bool:
        # fsspec does not say what a link leads to. One to a cache is followed; others may lead
        # around in circles, or to where nothing is shared.
        if entry["type"] == "directory":
            return True
        with contextlib.suppress(OSError):  # a link into what one may not look at
            return self.folder is not None and (Path(entry["name"]) / MANIFEST_NAME).is_file()
        return False

    def put(self, path: Path, name: str) -> None:
        """Send a file; it appears under its name only when it is whole."""
        final = self._path(name)
        folder, base = posixpath.split(final)
        if self.folder is not None:
            make_folder(Path(folder))
            with atomic_path(Path(final)) as copy:
                shutil.copyfile(path, copy)
            return
        with self._explained(name, writing=True):
            if self.protocol in _WHOLE_OBJECTS:
                self._fs.put_file(str(path), final)
                return
            # A name of its own: two may push to one place at the same time.
            temporary = f"{folder}/.{base}.{secrets.token_hex(16)}{TEMPORARY_SUFFIX}"
            self._fs.makedirs(folder, exist_ok=True)
            self._fs.put_file(str(path), temporary)
            self._fs.mv(temporary, final)

    def create(self) -> None:
        """Create the repository of a place on the hub where there is none; a new one is private.

        A cache holds the queries that are to be forgotten, so its owner decides who sees it.
        """
        if self.hub is None:
            return
        from huggingface_hub import HfApi

        with self._explained(writing=True):
            HfApi().create_repo(self.hub[0], repo_type="dataset", private=True, exist_ok=True)

    def commit(self, folder: Path, names: Sequence[str], message: str) -> None:
        """Add files of a local folder to a place on the hub, all of them or none.

        fsspec would make a commit a file, which the hub limits by the hour. The client sends large
        files in parallel and skips those that the hub has.
        """
        if self.hub is None:
            return
        from huggingface_hub import HfApi

        repository, revision, inside = self.hub
        with self._explained(writing=True):
            HfApi().upload_folder(
                repo_id=repository,
                folder_path=folder,
                path_in_repo=inside,
                allow_patterns=list(names),
                commit_message=message,
                repo_type="dataset",
                revision=revision,
            )

    @contextlib.contextmanager
    def _explained(self, name: str = "", *, writing: bool = False) -> Iterator[None]:
        """Turn what a library raises into one line, or FileNotFoundError where one reads."""
        try:
            yield
        except DuetError:
            raise
        except Exception as error:
            where = self.where(name)
            if is_missing(error) and not writing:
                raise FileNotFoundError(where) from error
            raise explain(error, where) from error


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
        if protocol == "hf":
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()  # the bar over all files is ours
        elif protocol in ("http", "https"):
            import aiohttp

            # No limit on the whole transfer: only a connection that stands still is given up.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        filesystem = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        s3 = protocol in ("s3", "s3a")
        advice = "pip install 'duet-unlearn[s3]'" if s3 else first_line(error)
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
