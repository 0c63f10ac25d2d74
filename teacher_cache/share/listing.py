"""`duet-cache list`: the caches below a URL."""

import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from duet_unlearn.errors import CacheError, CorruptCacheError
from duet_unlearn.teacher_cache.format.manifest import Manifest
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.share.place import find_manifest, parse_location
from duet_unlearn.teacher_cache.share.store import Store

# How far below the URL a cache may lie, and how many folders are looked into: a bucket may hold
# millions of other files.
_DEPTH = 4
_MOST_FOLDERS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedCache:
    """A cache that was found, or what is wrong with it."""

    name: str
    """Its folder relative to the URL; `.` for the URL itself."""
    url: str
    manifest: Manifest | None
    """None where it is damaged."""
    problem: str | None = None


def list_caches(url: str) -> tuple[ListedCache, ...]:
    """Find the finished caches at and below a URL, by name.

    Raises:
        CacheError: The place cannot be listed.
    """
    store = Store(parse_location(url)[0])
    if store.read_only:
        listed = _read(store, "")
        if listed is None:
            raise CacheError(
                f"{store.url}: {store.protocol}:// has no listing and there is no {MANIFEST_NAME}; "
                "give the URL of one cache"
            )
        return (listed,)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _read(store, name), sorted(_cache_folders(store)))
        return tuple(listed for listed in found if listed is not None)


def _read(store: Store, name: str) -> ListedCache | None:
    shown = name or "."
    try:
        found = find_manifest(store, name)
    except CorruptCacheError as error:
        return ListedCache(name=shown, url=store.where(name), manifest=None, problem=str(error))
    if found is None:
        return None
    return ListedCache(name=shown, url=store.where(name), manifest=found[0])


def _cache_folders(store: Store) -> Iterator[str]:
    """Yield folders with a manifest, breadth first; a cache is not searched for further ones."""
    level, looked_into = [""], 0
    for _ in range(_DEPTH + 1):
        below = []
        for folder in level:
            looked_into += 1
            if looked_into > _MOST_FOLDERS:
                raise CacheError(
                    f"{store.url}: more than {_MOST_FOLDERS} folders; give a URL further down"
                )
            entries = store.list(folder)
            if MANIFEST_NAME in entries:
                yield folder
                continue
            below += [
                posixpath.join(folder, name)
                for name, size in entries.items()
                if size is None and name != SHARD_FOLDER and not name.startswith(".")
            ]
        level = sorted(below)
