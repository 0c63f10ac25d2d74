"""Read a cache straight from a URL: the manifest first, each shard when it is used, one ahead.

What was fetched is kept by digest in the user's cache folder (DUET_CACHE_HOME) and used by the
next run; a pinned cache whose shards are all there needs no connection any more. Every shard is
hashed before its first use, one that was kept too. Processes that share the folder (one a GPU)
share the work through a lock a shard. fsspec's own file cache knows no limit on sizes, no lock and
no hash of the content, so a shard comes as one does in a pull.
"""

import contextlib
import functools
import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from duet_unlearn.data.models.fingerprint import user_folder
from duet_unlearn.errors import CacheError, CorruptCacheError, DuetError
from duet_unlearn.files import atomic_path, make_folder, write_error
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry, decode_manifest
from duet_unlearn.teacher_cache.format.quarantine import ensure_sound
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.reader import Shards, check_bytes
from duet_unlearn.teacher_cache.share.place import fetch_manifest, parse_location
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.teacher_cache.share.transfer import fetch_shard
from duet_unlearn.urls import redact_url

logger = logging.getLogger(__name__)

# A manifest under this name does not claim that the shards are there.
_KEPT_MANIFEST = f".{MANIFEST_NAME}"


class RemoteShards(Shards):
    """Makes the shards of a cache at a URL local, in a folder with the layout of a cache."""

    def __init__(self, url: str, manifest: Manifest, folder: Path) -> None:
        super().__init__(manifest, folder)
        self._url = url
        self._there: set[int] = set()
        self._ahead: threading.Thread | None = None
        make_folder(folder / SHARD_FOLDER)

    @functools.cached_property
    def store(self) -> Store:
        """The connection, made when the first shard has to be fetched."""
        return Store(self._url)

    def __getstate__(self) -> dict[str, Any]:
        # A loader's processes make their own connection.
        own = {name: value for name, value in self.__dict__.items() if name != "store"}
        return {**own, "_ahead": None}

    def path(self, index: int) -> Path:
        """Return the path of a shard once it is there with the bytes that the manifest names.

        Raises:
            CorruptCacheError: What arrives is not the shard.
            CacheError: The store cannot be read.
            OutputError: The folder cannot be written.
        """
        if index not in self._there:
            self._bring(index)
        if self._ahead is None or not self._ahead.is_alive():
            order = [*range(index + 1, len(self.manifest.shards)), *range(index)]
            following = next((i for i in order if i not in self._there), None)
            if following is not None:
                # A daemon: a run that ends does not wait for a shard that nobody reads.
                self._ahead = threading.Thread(
                    target=self._bring_quietly, args=(following,), name="duet-fetch", daemon=True
                )
                self._ahead.start()
        return super().path(index)

    def _bring(self, index: int) -> None:
        """Fetch a shard unless a sound copy is kept; raises as `path` does."""
        shard = self.manifest.shards[index]
        path = self.folder / shard.path
        try:
            with FileLock(path.with_name(f".{shard.name}.lock")):
                if path.exists():
                    try:
                        check_bytes(path, shard)
                    except CorruptCacheError:
                        logger.warning("%s: damaged; fetching it again", path)
                        path.unlink()
                if not path.exists():
                    fetch_shard(self.store, shard, self.folder)
                ensure_sound(self.folder, self.manifest, shard)
        except OSError as error:
            raise write_error(path, error) from error
        self._there.add(index)

    def _bring_quietly(self, index: int) -> None:
        try:
            self._bring(index)
        except DuetError as error:  # tried again, and told, when it is needed
            logger.debug("%s", error)

    @contextlib.contextmanager
    def for_a_while(self, shard: ShardEntry) -> Iterator[None]:
        """Have a shard in the folder and remove it again; raises as `path` does."""
        try:
            self._bring(shard.index)
            yield
        finally:
            (self.folder / shard.path).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """Return the names in the folder of shards at the URL; none where nothing can be listed."""
        if self.store.read_only:
            return set()
        return {name for name in self.store.list(SHARD_FOLDER) if not name.startswith(".")}


def kept_folder(digest: str) -> Path:
    """Return where the shards of a remote cache are kept."""
    return user_folder() / "caches" / digest.removeprefix("sha256:")


def open_remote(cache: str) -> RemoteShards:
    """Open `URL` or `URL@sha256:DIGEST`; only the manifest is fetched at once.

    Raises:
        CacheError: There is no finished cache there, or it cannot be reached.
        CorruptCacheError: The manifest is damaged.
        MismatchError: The cache has another digest than the one given.
    """
    url, pin = parse_location(cache)
    manifest = _kept_manifest(pin) if pin else None
    if manifest is None:
        manifest, data = fetch_manifest(Store(url), pin)
        kept = kept_folder(manifest.digest) / _KEPT_MANIFEST
        make_folder(kept.parent)
        with atomic_path(kept) as temporary:
            temporary.write_bytes(data)
    if pin is None:
        logger.info("%s: pin it as %s@%s", redact_url(url), redact_url(url), manifest.digest)
    return RemoteShards(url, manifest, kept_folder(manifest.digest))


def _kept_manifest(pin: str) -> Manifest | None:
    """Return the manifest of a pinned cache that was opened before."""
    path = kept_folder(pin) / _KEPT_MANIFEST
    try:
        manifest = decode_manifest(path.read_bytes(), str(path))
    except (OSError, CacheError):
        return None
    return manifest if manifest.digest == pin else None


@contextlib.contextmanager
def open_afresh(cache: str) -> Iterator[RemoteShards]:
    """Open a URL to check what lies there now; what was kept is neither trusted nor changed.

    Raises as `open_remote` does.
    """
    url, pin = parse_location(cache)
    manifest, _ = fetch_manifest(Store(url), pin)
    make_folder(user_folder())
    # Beside the kept ones: there is room for shards, which a small /tmp may not have.
    with tempfile.TemporaryDirectory(
        prefix="verify-", dir=user_folder(), ignore_cleanup_errors=True
    ) as folder:
        yield RemoteShards(url, manifest, Path(folder))
