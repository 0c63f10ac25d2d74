"""Push a cache to an object store, a shared folder or the hub, and pull it from there.

Shards go first, the card next, the manifest last: a cache is there when its manifest is, so nobody
sees half of one. Both directions resume where they were stopped, file by file.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from duet_unlearn.errors import CacheError, CorruptCacheError
from duet_unlearn.files import (
    TEMPORARY_SUFFIX,
    atomic_path,
    claimed_folder,
    make_folder,
    release_claim,
    remove_temporary_files,
    user_path,
)
from duet_unlearn.teacher_cache.build.lock import build_lock
from duet_unlearn.teacher_cache.format.card import CARD_NAME, write_card
from duet_unlearn.teacher_cache.format.manifest import (
    Manifest,
    ShardEntry,
    check_pin,
    is_cache_folder,
)
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.reader import check_bytes, read_pinned
from duet_unlearn.teacher_cache.share.place import (
    fetch_manifest,
    holds_cache,
    missing_shards,
    parse_location,
)
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.urls import is_url, redact_url

_JOBS = 8
_GRACE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferResult:
    """What a push or a pull came to."""

    place: str
    """Where the cache is now: a URL or a folder."""
    manifest: Manifest
    moved: tuple[ShardEntry, ...]

    @property
    def moved_shards(self) -> int:
        """Shards that were moved; 0 where everything was there already."""
        return len(self.moved)

    @property
    def moved_bytes(self) -> int:
        """Bytes of these shards; the manifest and the card are not counted."""
        return sum(shard.bytes for shard in self.moved)

    @property
    def hit(self) -> bool:
        """Whether everything was there already."""
        return not self.moved


def push(cache: str | Path, url: str, *, check: bool = False) -> TransferResult:
    """Copy a finished local cache to a URL.

    Args:
        cache: `PATH` or `PATH@sha256:DIGEST`.
        url: The place of this one cache, not of a collection.
        check: Compare what lies there by content even beside a manifest, and send damaged shards
            again.

    Raises:
        CacheError: There is no finished cache, or the place cannot be written.
        CorruptCacheError: A local shard is damaged; it is not sent.
        MismatchError: Another cache, or anything else, is at that place.
        ConfigurationError: So it is, in a local folder.
    """
    if is_url(cache):
        raise CacheError(f"{redact_url(str(cache))}: push takes a local cache; pull it first")
    folder, manifest = read_pinned(cache)
    place, pin = parse_location(url)
    check_pin(manifest, pin, folder)
    store = Store(place)
    if store.read_only:
        raise CacheError(
            f"{store.url}: {store.protocol}:// can only be read; push to s3://, hf:// or a folder"
        )
    here = store.folder
    with claimed_folder(here, is_cache_folder) if here else contextlib.nullcontext():
        store.create()
        finished = holds_cache(store, manifest)
        missing = missing_shards(
            store, manifest, folder / CARD_NAME, finished=finished, check=check
        )
        for shard in missing:
            check_bytes(folder / shard.path, shard)
        last = [] if finished else [n for n in (CARD_NAME, MANIFEST_NAME) if (folder / n).is_file()]
        _send(store, folder, manifest, missing, last)
        if here:
            release_claim(here)
    return TransferResult(place=store.url, manifest=manifest, moved=tuple(missing))


def _send(
    store: Store,
    folder: Path,
    manifest: Manifest,
    missing: Sequence[ShardEntry],
    last: Sequence[str],
) -> None:
    """Send shards, and behind them the files that make the cache a finished one."""
    if store.hub is not None:
        if names := [*(shard.path for shard in missing), *last]:
            store.commit(folder, names, f"Add teacher cache {manifest.digest[:19]}")
        return
    _each("push", missing, lambda shard: store.put(folder / shard.path, shard.path))
    if not last or holds_cache(store, manifest):  # somebody else may have pushed meanwhile
        return
    there = store.list(SHARD_FOLDER)
    for shard in manifest.shards:
        if there.get(shard.name) != shard.bytes:
            raise CacheError(
                f"{store.where(shard.path)}: was sent, but is not there with "
                f"its {shard.bytes} bytes; run the same push again"
            )
    for name in last:
        store.put(folder / name, name)


def pull(url: str, folder: str | Path) -> TransferResult:
    """Copy a cache from a URL into a local folder; what is there already is not moved again.

    Raises:
        CacheError: There is no finished cache, or it cannot be read.
        OutputError: The folder cannot be written.
        ConfigurationError: The folder is none, or not ours.
        CorruptCacheError: What arrives is not what the manifest lists.
        MismatchError: The digest is another, or the folder holds something else.
    """
    folder = user_path(folder, "the folder to pull into")
    place, pin = parse_location(url)
    store = Store(place)
    manifest, data = fetch_manifest(store, pin)
    here = Store(str(folder))
    try:
        finished = holds_cache(here, manifest)
    except CorruptCacheError as error:
        raise CorruptCacheError(
            f"{error}; this is the folder to pull into: move its {MANIFEST_NAME} away and run the "
            "same pull again, or choose another folder"
        ) from error
    with claimed_folder(folder, is_cache_folder), build_lock(folder):
        remove_temporary_files(folder)
        missing = missing_shards(here, manifest, folder / CARD_NAME, finished=finished, check=True)
        needed, free = sum(shard.bytes for shard in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise CacheError(
                f"{folder}: {needed} bytes to fetch, {free} bytes free; free some space or choose "
                "another folder"
            )
        make_folder(folder / SHARD_FOLDER)
        try:
            _each("pull", missing, lambda shard: fetch_shard(store, shard, folder))
        except BaseException:
            remove_temporary_files(folder / SHARD_FOLDER)  # of threads that were left behind
            raise
        if not (folder / CARD_NAME).exists():
            # The digest does not cover the card that lies there, so it is written anew.
            write_card(folder, manifest)
        if not finished:
            with atomic_path(folder / MANIFEST_NAME) as temporary:
                temporary.write_bytes(data)
        release_claim(folder)
    return TransferResult(place=str(folder), manifest=manifest, moved=tuple(missing))


def fetch_shard(store: Store, shard: ShardEntry, folder: Path) -> None:
    """Bring a shard into a cache folder that nobody else writes: there whole or not at all.

    Wrong bytes are fetched once more before they are an error.
    """
    for left_behind in (folder / SHARD_FOLDER).glob(f".{shard.name}.*{TEMPORARY_SUFFIX}"):
        left_behind.unlink(missing_ok=True)
    for last in (False, True):
        try:
            with atomic_path(folder / shard.path) as temporary:
                try:
                    store.get(shard.path, temporary, shard.bytes)
                except FileNotFoundError:
                    raise CorruptCacheError(
                        f"{store.where(shard.path)}: the manifest lists it, but it is not there; "
                        "push the cache again"
                    ) from None
                check_bytes(temporary, shard, store.where(shard.path))
            return
        except CorruptCacheError:
            if last:
                raise


def _each(what: str, shards: Sequence[ShardEntry], move: Callable[[ShardEntry], None]) -> None:
    """Move all shards, several at a time; the first error stops the rest and is raised.

    An interrupt gives the others a moment to tidy up and does not wait for them: their threads are
    daemons, which a process that ends leaves behind even where the network stands still.
    """
    remaining, errors = iter(shards), list[BaseException]()
    total = sum(shard.bytes for shard in shards)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as bar:

        def loop() -> None:
            for shard in remaining:  # one iterator for all threads: each shard is taken once
                try:
                    move(shard)
                except BaseException as error:
                    errors.append(error)
                if errors:
                    return
                bar.update(shard.bytes)

        threads = [threading.Thread(target=loop, daemon=True) for _ in shards[:_JOBS]]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:
            errors.append(error)
            # aiohttp would report the connections that are dropped here on purpose.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            last = time.monotonic() + _GRACE_SECONDS
            for thread in threads:
                thread.join(max(0.0, last - time.monotonic()))
            raise
    if errors:
        raise errors[0]
