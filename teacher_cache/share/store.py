"""Files below one URL, over fsspec: read with limits, streamed with resume, written whole.

A cache is a handful of names below one URL, so that is all a store knows. Reads never take more
than the caller allows, because whoever runs the server may lie about sizes.
"""

import hashlib
import logging
import posixpath
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet_unlearn.errors import CacheError, ConfigurationError, CorruptCacheError, DuetError
from duet_unlearn.files import fsync
from duet_unlearn.teacher_cache.share.location import hide_credentials, protocol_of
from duet_unlearn.teacher_cache.share.remote_errors import (
    ATTEMPTS,
    explain,
    is_missing,
    is_transient,
    pause,
    with_retries,
)

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
# A server that cuts every connection still brings a file home, as long as each one brings this.
_PROGRESS_BYTES = 1 << 20
_READ_ONLY = ("http", "https")
# These show a file once it is whole; elsewhere a temporary name is renamed.
_WHOLE_OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "hf", "memory")
_EXTRAS = {"s3": "s3", "s3a": "s3"}
# s3fs sends larger files in parts of this size, and the ETag is made of the parts' hashes.
_S3_PART_BYTES = 50 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file or folder in a listing."""

    size: int
    is_folder: bool
    etag: str | None
    """What the store says of the content: an S3 ETag, or `sha256:<hex>`; None where nothing."""


class Store:
    """The files below one URL; names are relative to it.

    Args:
        url: A URL or a local path.

    Raises:
        ConfigurationError: The protocol is unknown or its package is not installed.
        CacheError: The store refuses the connection outright.
    """

    def __init__(self, url: str) -> None:
        self.url = hide_credentials(url)
        self.protocol = protocol_of(url)
        self._fs, self._root = _open_filesystem(url, self.protocol)
        self.read_only = self.protocol in _READ_ONLY
        self.has_listing = not self.read_only

    def where(self, name: str) -> str:
        """Return the URL of a file, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file's bytes, or None where there is none.

        Raises:
            CorruptCacheError: It is larger than `limit` bytes.
            CacheError: The store cannot be read.
        """

        def attempt() -> bytes:
            pieces = bytearray()
            with self._open(name, 0) as file:
                while len(pieces) <= limit and (piece := file.read(limit + 1 - len(pieces))):
                    pieces += piece
            return bytes(pieces)

        try:
            data = with_retries(attempt, self.where(name))
        except FileNotFoundError:
            return None
        if len(data) > limit:
            raise CorruptCacheError(
                f"{self.where(name)}: more than {limit} bytes; expected the file of a cache"
            )
        return data

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """Yield a file's bytes, at most `size` and one more; after a cut, go on from the last byte.

        One byte too many tells the caller that the file is longer than it should be.

        Raises:
            CorruptCacheError: The file is not there.
            CacheError: The store cannot be read.
        """
        offset = reached = failures = 0
        while True:
            try:
                with self._open(name, offset) as file:
                    while piece := file.read(min(CHUNK_BYTES, size + 1 - offset)):
                        offset += len(piece)
                        yield piece
                        if offset > size:
                            return
                return
            except DuetError:
                raise
            except Exception as error:
                where = self.where(name)
                if offset == size:  # cut behind the last byte that was asked for
                    return
                if is_missing(error):
                    raise CorruptCacheError(
                        f"{where}: the manifest lists it, but it is not there; push the cache again"
                    ) from error
                failures = 1 if offset - reached >= _PROGRESS_BYTES else failures + 1
                reached = offset
                if failures >= ATTEMPTS or not is_transient(error):
                    raise explain(error, where) from error
                pause(failures - 1, error, where)

    def _open(self, name: str, offset: int) -> Any:
        path = self._path(name)
        if self.read_only:
            return _open_http(self._fs, path, offset)
        if self.protocol == "file" and not Path(path).is_file():
            raise FileNotFoundError(path)  # a pipe or a device would hang
        file = self._fs.open(path, "rb", block_size=CHUNK_BYTES, cache_type="none")
        file.seek(offset)
        return file

    def list(self, folder: str = "") -> dict[str, StoredFile]:
        """Return what lies directly in a folder, by name; empty where there is no such folder.

        Raises:
            CacheError: The store cannot be listed.
        """
        try:
            entries = with_retries(
                lambda: self._fs.ls(self._path(folder), detail=True, refresh=True),
                self.where(folder),
            )
        except FileNotFoundError:
            return {}
        return {
            posixpath.basename(entry["name"].rstrip("/")): StoredFile(
                size=entry["size"] or 0,
                is_folder=entry["type"] == "directory",
                etag=_etag(entry),
            )
            for entry in entries
            # Some tools keep an empty object under the folder's own name.
            if entry["name"].rstrip("/") != self._path(folder).rstrip("/")
        }

    def put_file(self, path: Path, name: str, sha256: str) -> None:
        """Send a file with that `sha256:<hex>`; it appears under its name only when it is whole.

        Raises:
            CacheError: The store cannot be written.
        """
        self._put(name, lambda target: self._fs.put_file(str(path), target), sha256)

    def put_bytes(self, data: bytes, name: str) -> None:
        """Send a small file; it appears under its name only when it is whole.

        Raises:
            CacheError: The store cannot be written.
        """
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self._put(name, lambda target: self._fs.pipe_file(target, data), digest)

    def _put(self, name: str, send: Callable[[str], object], digest: str) -> None:
        final = self._path(name)

        def attempt() -> None:
            if self.protocol in _WHOLE_OBJECTS:
                send(final)
                return
            folder, base = posixpath.split(final)
            # A name of its own: two may push to one place at the same time.
            temporary = f"{folder}/.{base}.{uuid.uuid4().hex}.tmp"
            self._fs.makedirs(folder, exist_ok=True)
            send(temporary)
            if self._hash(temporary) != digest:
                raise CacheError(
                    f"{self.where(name)}: what arrived is not what was sent; check that disk"
                )
            if self.protocol == "file":
                fsync(Path(temporary))
            self._fs.mv(temporary, final)
            if self.protocol == "file":
                fsync(Path(folder))

        try:
            with_retries(attempt, self.where(name))
        except FileNotFoundError as error:
            raise explain(error.__cause__ or error, self.where(name)) from error

    def has(self, path: Path, name: str, found: StoredFile, sha256: str) -> bool:
        """Say whether a stored file has the bytes of a local one.

        The store's own hash settles it where there is one; else the file is read back.

        Args:
            path: The local file.
            name: The stored one.
            found: Its entry in a listing.
            sha256: `sha256:<hex>` of the local file.

        Raises:
            CacheError: The store cannot be read.
        """
        if found.is_folder or found.size != path.stat().st_size:
            return False
        if found.etag is not None and found.etag in (sha256, _s3_etag(path, found.etag)):
            return True
        try:
            return with_retries(lambda: self._hash(self._path(name)), self.where(name)) == sha256
        except FileNotFoundError:
            return False

    def _hash(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(path, "rb", block_size=CHUNK_BYTES, cache_type="none") as file:
            while piece := file.read(CHUNK_BYTES):
                digest.update(piece)
        return "sha256:" + digest.hexdigest()


def _open_filesystem(url: str, protocol: str) -> tuple[Any, str]:
    import fsspec

    if protocol == "file":
        path = url.partition("://")[2] or url
        return fsspec.filesystem("file"), str(Path(path).expanduser().absolute())
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        if protocol in _READ_ONLY:
            options["client_kwargs"] = {"timeout": _http_timeout(), "trust_env": True}
        elif protocol in ("s3", "s3a"):
            # The pauses between attempts are ours.
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
        filesystem = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        advice = f"pip install 'duet-unlearn[{extra}]'" if extra else str(error).splitlines()[0]
        raise ConfigurationError(
            f"{hide_credentials(url)}: a package for {protocol}:// is missing; {advice}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(
            f"{hide_credentials(url)}: unknown protocol {protocol}://; use s3://, hf://, https:// "
            "or a folder"
        ) from error
    except Exception as error:
        raise explain(error, url) from error
    return filesystem, str(filesystem._strip_protocol(url)).rstrip("/")


def _http_timeout() -> Any:
    import aiohttp

    # No limit on the whole transfer: only a connection that stands still is given up.
    return aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


def _open_http(filesystem: Any, url: str, offset: int) -> Any:
    """Open one response as a file that stands at `offset`, whether the server knows ranges or not.

    fsspec's own ranged reads hold a whole answer in memory, whatever its size; this never does.
    """
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    # A size saves the HEAD request that would ask for it; a block size of 0 asks for a stream.
    file = filesystem.open(url, "rb", block_size=0, size=1, headers=headers)
    try:
        skip = 0 if not offset or file.r.status == 206 else offset
        while skip:
            piece = file.read(min(CHUNK_BYTES, skip))
            if not piece:
                raise CacheError(f"{hide_credentials(url)}: shorter than before; fetch it again")
            skip -= len(piece)
    except BaseException:
        file.close()
        raise
    return file


def _etag(entry: dict[str, Any]) -> str | None:
    if isinstance(entry.get("ETag"), str):
        return str(entry["ETag"]).strip('"')
    lfs = entry.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    return f"sha256:{sha256}" if isinstance(sha256, str) else None


def _s3_etag(path: Path, like: str) -> str | None:
    """Return the ETag that S3 gives a file, whole or in parts as `like` is; None where unknown."""
    digest, dash, _ = like.partition("-")
    if len(digest) != 32:
        return None
    part_bytes = _S3_PART_BYTES if dash else CHUNK_BYTES
    whole, joined, count = hashlib.md5(usedforsecurity=False), b"", 0
    with path.open("rb") as file:
        while piece := file.read(part_bytes):
            count += 1
            whole.update(piece)
            joined += hashlib.md5(piece, usedforsecurity=False).digest() if dash else b""
    if not dash:
        return whole.hexdigest()
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{count}"
