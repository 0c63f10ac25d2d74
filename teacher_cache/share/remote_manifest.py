"""The manifest of a cache that lies somewhere else: untrusted, so limited and checked."""

from dataclasses import dataclass

from duet_unlearn.errors import CacheError, MismatchError
from duet_unlearn.teacher_cache.format.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.share.location import Location
from duet_unlearn.teacher_cache.share.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteManifest:
    """A checked manifest with the very bytes that it was read from."""

    manifest: Manifest
    data: bytes


def find_manifest(store: Store, folder: str = "") -> RemoteManifest | None:
    """Read the manifest in a folder of a store, or return None where there is none.

    Raises:
        CorruptCacheError: It is damaged, edited, too large or of another format version.
        CacheError: The store cannot be read.
    """
    name = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
    data = store.read(name, MAX_MANIFEST_BYTES)
    if data is None:
        return None
    return RemoteManifest(manifest=decode_manifest(data, store.where(name)), data=data)


def fetch_manifest(store: Store, location: Location) -> RemoteManifest:
    """Read the manifest of the cache at a location and check the digest it is pinned to.

    Raises:
        CacheError: There is no finished cache there.
        CorruptCacheError: Its manifest is damaged.
        MismatchError: It has another digest than the location names.
    """
    found = find_manifest(store)
    if found is None:
        if store.has_listing and store.list(SHARD_FOLDER):
            raise CacheError(
                f"{store.url}: unfinished, no {MANIFEST_NAME}; push the cache again, it goes on"
            )
        raise CacheError(f"{store.url}: no teacher cache there, no {MANIFEST_NAME}; check the URL")
    if location.pin not in (None, found.manifest.digest):
        raise MismatchError(
            f"{store.url}: this cache has digest {found.manifest.digest}, expected {location.pin}; "
            "get the cache that was named, or change the digest"
        )
    return found


def differences(there: Manifest, here: Manifest) -> list[str]:
    """Say what differs between two caches, `entry: there / here` each; empty for the same."""
    if there.digest == here.digest:
        return []
    found = there.recipe.differences(here.recipe)
    if there.queries != here.queries:
        rows = f"{there.num_rows} rows {there.queries[:19]} / {here.num_rows} {here.queries[:19]}"
        found.append(f"queries: {rows}")
    if not found and [s.sha256 for s in there.shards] != [s.sha256 for s in here.shards]:
        found.append(
            f"shards: {len(there.shards)} / {len(here.shards)} of the same recipe and queries, "
            "from another run of the teacher"
        )
    return found or ["names or engine versions in the manifest alone"]


def refuse_other(where: str, there: Manifest, here: Manifest, advice: str) -> None:
    """Refuse a place that holds another cache.

    Raises:
        MismatchError: The digests differ; the message says in what.
    """
    if there.digest != here.digest:
        raise MismatchError(
            f"{where}: holds another cache; differs (there / here) in "
            f"{'; '.join(differences(there, here))}; {advice}"
        )
