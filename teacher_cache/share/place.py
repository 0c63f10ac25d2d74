"""What lies at a place where a cache is read from or copied to: another's files are never touched.

A manifest vouches for the shards beside it. Without one, a place is empty or holds byte for byte a
part of the very cache that is to come: only that proves that a copy was stopped there.
"""

import logging
import posixpath
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError
from duet_unlearn.files import user_path
from duet_unlearn.teacher_cache.format.card import CARD_NAME
from duet_unlearn.teacher_cache.format.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ShardEntry,
    check_pin,
    decode_manifest,
    split_pin,
)
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.urls import is_url, redact_url

logger = logging.getLogger(__name__)

_ANOTHER_PLACE = "choose another place for this cache, such as a new folder below it"
# How far below a URL a cache may lie, and how many folders are looked into: a bucket may hold
# millions of other files.
_DEPTH = 4
_MOST_FOLDERS = 2000


def parse_location(cache: str | Path) -> tuple[str, str | None]:
    """Split `PLACE[@sha256:DIGEST]` into a URL or a path, without a slash at its end, and the pin.

    Raises:
        CacheError: There is no place, the digest is not 64 hex digits, or no file name can be put
            behind the URL.
    """
    url, pin = split_pin(cache)
    if not is_url(cache):
        if not url.partition("@sha256:")[0].strip():
            raise CacheError("no place is named; give a folder or a URL")
        return str(user_path(url, "cache")), pin
    if "://" in url.partition("://")[2]:
        raise CacheError(f"{redact_url(url)}: chained URLs are not supported; give one of a folder")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise CacheError(f"{redact_url(url)}: not a URL; check it") from None
    if parts.scheme in ("http", "https") and (not parts.netloc or parts.query or parts.fragment):
        raise CacheError(
            f"{redact_url(url)}: expected https://HOST/FOLDER without a query; a cache is several "
            "files below one URL"
        )
    return url.rstrip("/"), pin


def find_manifest(store: Store, folder: str = "") -> tuple[Manifest, bytes] | None:
    """Read a manifest and the bytes it was read from, or return None where there is none."""
    name = posixpath.join(folder, MANIFEST_NAME)
    data = store.read(name, MAX_MANIFEST_BYTES)
    return None if data is None else (decode_manifest(data, store.where(name)), data)


def fetch_manifest(store: Store, pin: str | None) -> tuple[Manifest, bytes]:
    """Read the manifest of the cache at a place and check the digest it is pinned to."""
    found = find_manifest(store)
    if found is None:
        if not store.read_only and store.list(SHARD_FOLDER):
            raise CacheError(
                f"{store.url}: unfinished, no {MANIFEST_NAME}; push the cache again, it resumes"
            )
        raise CacheError(f"{store.url}: no teacher cache there, no {MANIFEST_NAME}; check the URL")
    check_pin(found[0], pin, store.url)
    return found


def holds_cache(store: Store, manifest: Manifest) -> bool:
    """Say whether this cache is finished at a place, and refuse a place where another one is."""
    found = find_manifest(store)
    if found is None:
        return False
    if found[0].digest != manifest.digest:
        raise MismatchError(
            f"{store.url}: holds another cache; differs (there / here) in "
            f"{'; '.join(_differences(found[0], manifest))}; {_ANOTHER_PLACE}"
        )
    return True


def _differences(there: Manifest, here: Manifest) -> list[str]:
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


def missing_shards(
    store: Store, manifest: Manifest, card: Path, *, finished: bool, check: bool
) -> list[ShardEntry]:
    """Return the shards that have to be copied to a place; refuse one that holds anything else.

    Beside a finished cache's manifest, sizes of shards are enough unless asked to `check` contents.
    """
    there = store.list(SHARD_FOLDER)
    listed = {shard.name for shard in manifest.shards}
    foreign = [f"{SHARD_FOLDER}/{n}" for n in there if n not in listed and n[:1] != "."]
    for name, size in ({} if finished else store.list()).items():
        same_card = (
            name == CARD_NAME
            and card.is_file()
            and size == card.stat().st_size
            and store.sha256(name, size) == sha256_file(card)
        )
        if not same_card and name != SHARD_FOLDER and name[:1] != ".":
            foreign.append(name)
    missing = []
    for shard in manifest.shards:
        same = there.get(shard.name) == shard.bytes
        if same and (check or not finished):
            same = store.sha256(shard.path, shard.bytes) == shard.sha256
        if not same:
            missing.append(shard)
            if shard.name in there and not finished:
                foreign.append(shard.path)
    if foreign:
        raise MismatchError(
            f"{store.url}: holds {min(foreign)[:80]!r}, which is not of this cache; perhaps "
            f"another one is being written there: {_ANOTHER_PLACE}, or remove it"
        )
    return missing


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
    place, pin = parse_location(url)
    if pin is not None:
        raise CacheError(f"{url}: a digest names one cache; list takes the place that holds some")
    store = Store(place)
    if not store.read_only:
        with ThreadPoolExecutor() as pool:
            listed = pool.map(lambda name: _read(store, name), sorted(_cache_folders(store)))
            return tuple(cache for cache in listed if cache is not None)
    cache = _read(store, "")
    if cache is None:
        raise CacheError(
            f"{store.url}: {store.protocol}:// has no listing and there is no {MANIFEST_NAME}; "
            "give the URL of one cache"
        )
    return (cache,)


def _read(store: Store, name: str) -> ListedCache | None:
    manifest = problem = None
    try:
        found = find_manifest(store, name)
        if found is None:
            return None
        manifest = found[0]
    except CorruptCacheError as error:
        problem = str(error)
    return ListedCache(name=name or ".", url=store.where(name), manifest=manifest, problem=problem)


def _cache_folders(store: Store) -> Iterator[str]:
    """Yield folders with a manifest, breadth first; a cache is not searched for further ones."""
    waiting, looked_into = deque([("", 0)]), 0
    while waiting:
        looked_into += 1
        if looked_into > _MOST_FOLDERS:
            raise CacheError(
                f"{store.url}: more than {_MOST_FOLDERS} folders; give a URL further down"
            )
        folder, depth = waiting.popleft()
        try:
            entries = store.list(folder)
        except CacheError as error:
            # A connection that is lost hides caches, a folder of another user's none of ours.
            if not folder or not isinstance(error.__cause__, PermissionError):
                raise
            logger.warning("%s; passed over", error)
            continue
        if MANIFEST_NAME in entries:
            yield folder
        elif depth < _DEPTH:
            waiting += [
                (posixpath.join(folder, name), depth + 1)
                for name, size in sorted(entries.items())
                if size is None and name != SHARD_FOLDER and not name.startswith(".")
            ]
