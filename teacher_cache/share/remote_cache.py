"""Read a cache straight from a URL: the manifest first, shards while they are used.

What was fetched is kept by digest in the user's cache folder (DUET_CACHE_HOME) and used by the
next run. Once all shards are there the folder is an ordinary cache, and a pinned one needs no
connection any more.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from duet_unlearn.data.models.fingerprint import user_folder
from duet_unlearn.errors import CacheError
from duet_unlearn.files import atomic_path, make_folder
from duet_unlearn.teacher_cache.format.card import write_card
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry, read_manifest
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.share.location import Location, parse_location
from duet_unlearn.teacher_cache.share.remote_manifest import RemoteManifest, fetch_manifest
from duet_unlearn.teacher_cache.share.remote_shards import RemoteShards
from duet_unlearn.teacher_cache.share.store import Store

logger = logging.getLogger(__name__)


def kept_folder(digest: str) -> Path:
    """Return where the shards of a remote cache are kept."""
    return user_folder() / "caches" / digest.removeprefix("sha256:")


def open_remote(cache: str) -> CacheReader:
    """Open `URL` or `URL@sha256:DIGEST`; only the manifest is fetched at once.

    Raises:
        CacheError: There is no finished cache there, or it cannot be reached.
        CorruptCacheError: The manifest is damaged.
        MismatchError: The cache has another digest than the one given.
    """
    location = parse_location(cache)
    found = _kept_manifest(location)
    if found is None:
        store = Store(location.url)
        remote = fetch_manifest(store, location)
        return _reader(location, remote.manifest, store, remote)
    return _reader(location, found, None, None)


def _reader(
    location: Location, manifest: Manifest, store: Store | None, remote: RemoteManifest | None
) -> CacheReader:
    folder = kept_folder(manifest.digest)

    def complete() -> None:
        if remote is None:
            return
        with FileLock(folder / ".complete.lock"):  # others may have fetched the last shard as well
            if not (folder / MANIFEST_NAME).exists():
                write_card(folder, manifest)
                with atomic_path(folder / MANIFEST_NAME) as temporary:
                    temporary.write_bytes(remote.data)

    if location.pin is None:
        logger.info("%s: pin it as %s@%s", location.shown, location.shown, manifest.digest)
    shards = RemoteShards(lambda: store or Store(location.url), manifest, folder, complete)
    return CacheReader(folder, manifest, shards)


def _kept_manifest(location: Location) -> Manifest | None:
    """Return the manifest of a pinned cache whose shards were all fetched before."""
    if location.pin is None:
        return None
    try:
        manifest = read_manifest(kept_folder(location.pin))
    except CacheError:
        return None
    return manifest if manifest.digest == location.pin else None


@dataclass(frozen=True, kw_only=True, slots=True)
class FreshCopy:
    """A remote cache that is read anew, a shard at a time, to check what lies there now."""

    manifest: Manifest
    url: str
    folder: Path
    """A temporary folder in the layout of a cache."""
    unlisted: tuple[str, ...]
    """Names in the remote `shards/` that the manifest does not list."""
    shards: RemoteShards

    @contextlib.contextmanager
    def shard(self, shard: ShardEntry) -> Iterator[None]:
        """Have a shard in the folder for a while.

        Raises:
            CorruptCacheError: It is missing there, or has other bytes than the manifest lists.
            CacheError: The store cannot be read.
        """
        self.shards.fetch(self.manifest.shards.index(shard))
        try:
            yield
        finally:
            (self.folder / SHARD_FOLDER / shard.name).unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_copy(cache: str) -> Iterator[FreshCopy]:
    """Fetch a remote cache for checking; nothing that was kept before is trusted or changed.

    Raises:
        CacheError: There is no finished cache there, or it cannot be reached.
        MismatchError: The cache has another digest than the one given.
    """
    location = parse_location(cache)
    store = Store(location.url)
    manifest = fetch_manifest(store, location).manifest
    listed = {shard.name for shard in manifest.shards}
    there = store.list(SHARD_FOLDER) if store.has_listing else {}
    make_folder(user_folder())
    # Beside the kept ones: there is room for shards, which a small /tmp may not have.
    with tempfile.TemporaryDirectory(
        prefix="verify-", dir=user_folder(), ignore_cleanup_errors=True
    ) as name:
        shards = RemoteShards(lambda: store, manifest, Path(name))
        try:
            yield FreshCopy(
                manifest=manifest,
                url=store.url,
                folder=Path(name),
                unlisted=tuple(sorted(set(there) - listed)),
                shards=shards,
            )
        finally:
            shards.stop()
