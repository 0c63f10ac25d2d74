"""Push a cache to an object store, a shared folder or the hub, and pull it from there.

Shards go first, the card next, the manifest last: a cache is there when its manifest is, so nobody
sees half of one. Both directions go on where they were stopped, and move nothing that is there.
"""

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError
from duet_unlearn.files import (
    atomic_path,
    claim_folder,
    make_folder,
    release_claim,
    remove_temporary_files,
)
from duet_unlearn.teacher_cache.build.lock import build_lock
from duet_unlearn.teacher_cache.format.card import CARD_NAME, write_card
from duet_unlearn.teacher_cache.format.manifest import (
    Manifest,
    ShardEntry,
    is_cache_folder,
    read_manifest,
    split_pin,
)
from duet_unlearn.teacher_cache.format.schema import FORMAT_NAME, MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.format.shard import ShardFile
from duet_unlearn.teacher_cache.reader import check_bytes, check_size
from duet_unlearn.teacher_cache.share.hub import HubPlace
from duet_unlearn.teacher_cache.share.location import hide_credentials, is_url, parse_location
from duet_unlearn.teacher_cache.share.remote_manifest import (
    fetch_manifest,
    find_manifest,
    refuse_other,
)
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.teacher_cache.share.transfer import (
    JOBS,
    Progress,
    check_space,
    fetch_shard,
    progress,
    run_all,
)

logger = logging.getLogger(__name__)

_CARD_BYTES = 1 << 20
_TEMPORARY = re.compile(r"\..+\.tmp")
_ANOTHER_PLACE = "choose another place for this cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferResult:
    """What a push or a pull came to."""

    place: str
    """Where the cache is now: a URL or a folder."""
    manifest: Manifest
    moved_shards: int
    moved_bytes: int
    """Bytes of the shards that were moved; the manifest and the card are not counted."""

    @property
    def hit(self) -> bool:
        """Whether everything was there already."""
        return self.moved_shards == 0


def push(cache: str | Path, url: str, *, check: bool = False) -> TransferResult:
    """Copy a finished local cache to a URL.

    Args:
        cache: `PATH` or `PATH@sha256:DIGEST`.
        url: The place of this one cache, not of a collection.
        check: Compare what lies there by content even below a manifest, and send damaged shards
            again.

    Raises:
        CacheError: There is no finished cache, or the place cannot be written.
        CorruptCacheError: A local shard is damaged; it is not sent.
        MismatchError: Another cache is at that place.
    """
    if is_url(cache):
        raise CacheError(f"{hide_credentials(str(cache))}: push takes a local cache; pull it first")
    folder, pin = split_pin(cache)
    manifest = read_manifest(folder)
    target = parse_location(url)
    for expected in (pin, target.pin):
        if expected not in (None, manifest.digest):
            raise MismatchError(
                f"{folder}: this cache has digest {manifest.digest}, expected {expected}; push "
                "the cache that was named, or change the digest"
            )
    for shard in manifest.shards:
        check_size(folder, shard)
    store = Store(target.url)
    if store.read_only:
        raise CacheError(
            f"{store.url}: {store.protocol}:// can only be read; push to s3://, hf:// or a folder"
        )
    hub = HubPlace.parse(target.url) if store.protocol == "hf" else None
    if hub is not None:
        hub.create_repository()
    finished = _is_finished(store, manifest)
    if not finished:
        _refuse_files_of_others(store)
    missing = _missing_there(store, folder, manifest, sizes_do=finished and not check)
    with ThreadPoolExecutor(max_workers=JOBS) as pool:
        list(pool.map(lambda shard: check_bytes(folder, shard), missing))
    if hub is not None:
        _commit(hub, folder, manifest, missing, finished=finished)
    else:
        _send(store, folder, missing)
        if not finished:
            _publish(store, folder, manifest)
    return _result(store.url, manifest, missing)


def _refuse_files_of_others(store: Store) -> None:
    """Refuse a place that holds anything but what a stopped push of ours leaves.

    Raises:
        CacheError: It does, and what it is.
    """
    ours = {SHARD_FOLDER, ".gitattributes"}
    there = [name for name in store.list() if name not in ours and not _TEMPORARY.fullmatch(name)]
    if CARD_NAME in there:
        card = store.read(CARD_NAME, _CARD_BYTES) or b""
        if FORMAT_NAME.encode() in card:
            there.remove(CARD_NAME)
    if there:
        raise CacheError(
            f"{store.url}: holds {min(there)[:80]!r} and no cache; {_ANOTHER_PLACE}, such as a new "
            "folder below it"
        )


def _is_finished(store: Store, manifest: Manifest) -> bool:
    found = find_manifest(store)
    if found is None:
        return False
    refuse_other(store.url, found.manifest, manifest, _ANOTHER_PLACE)
    return True


def _missing_there(
    store: Store, folder: Path, manifest: Manifest, *, sizes_do: bool
) -> list[ShardEntry]:
    """Return the shards that have to be sent.

    A manifest vouches for the shards beside it, so their sizes do; without one, or to check, what
    lies there is compared by content.
    """
    there = store.list(SHARD_FOLDER)
    _refuse_unlisted(store.where(SHARD_FOLDER), list(there), manifest)

    def is_there(shard: ShardEntry) -> bool:
        found = there.get(shard.name)
        if found is None or sizes_do:
            return found is not None and found.size == shard.bytes
        name = f"{SHARD_FOLDER}/{shard.name}"
        return store.has(folder / name, name, found, shard.sha256)

    return _without(is_there, manifest.shards)


def _without(
    is_there: Callable[[ShardEntry], bool], shards: Sequence[ShardEntry]
) -> list[ShardEntry]:
    with ThreadPoolExecutor(max_workers=JOBS) as pool:
        return [s for s, there in zip(shards, pool.map(is_there, shards), strict=True) if not there]


def _refuse_unlisted(where: str, names: Sequence[str], manifest: Manifest) -> None:
    listed = {shard.name for shard in manifest.shards}
    unlisted = sorted(n for n in names if n not in listed and not n.startswith("."))
    if unlisted:
        raise MismatchError(
            f"{where}: holds {unlisted[0][:80]} and no manifest that lists it, perhaps of another "
            f"cache that is being written; {_ANOTHER_PLACE}, or remove it"
        )


def _commit(
    hub: HubPlace,
    folder: Path,
    manifest: Manifest,
    missing: Sequence[ShardEntry],
    *,
    finished: bool,
) -> None:
    names = [f"{SHARD_FOLDER}/{shard.name}" for shard in missing]
    if not finished:
        names += [name for name in (CARD_NAME, MANIFEST_NAME) if (folder / name).is_file()]
    if names:
        message = f"Add teacher cache {manifest.digest[:19]}"
        hub.commit([(folder / name, name) for name in names], message)


def _send(store: Store, folder: Path, shards: Sequence[ShardEntry]) -> None:
    with progress("push", sum(shard.bytes for shard in shards)) as bar:

        def send(shard: ShardEntry) -> None:
            name = f"{SHARD_FOLDER}/{shard.name}"
            bar.add(0)
            store.put_file(folder / name, name, shard.sha256)
            bar.add(shard.bytes)

        run_all(send, shards, bar, JOBS)


def _publish(store: Store, folder: Path, manifest: Manifest) -> None:
    """Write card and manifest, once everything that the manifest lists is there."""
    there = store.list(SHARD_FOLDER)
    _refuse_unlisted(store.where(SHARD_FOLDER), list(there), manifest)
    for shard in manifest.shards:
        found = there.get(shard.name)
        if found is None or found.size != shard.bytes:
            raise CacheError(
                f"{store.where(f'{SHARD_FOLDER}/{shard.name}')}: was sent, but is not there with "
                f"its {shard.bytes} bytes; run the same push again"
            )
    # Somebody else may have pushed here in the meantime.
    _is_finished(store, manifest)
    card = folder / CARD_NAME
    if card.is_file():
        store.put_bytes(card.read_bytes(), CARD_NAME)
    store.put_bytes((folder / MANIFEST_NAME).read_bytes(), MANIFEST_NAME)


def pull(url: str, folder: Path) -> TransferResult:
    """Copy a cache from a URL into a local folder; what is there already is not moved again.

    Args:
        url: `URL` or `URL@sha256:DIGEST`; a local path works too.
        folder: A new or empty folder, or one that holds this cache or a part of it.

    Raises:
        CacheError: There is no finished cache, or a place cannot be read or written.
        CorruptCacheError: What arrives is not what the manifest lists.
        MismatchError: The digest is another, or the folder holds something else.
    """
    location = parse_location(url)
    store = Store(location.url)
    found = fetch_manifest(store, location)
    manifest = found.manifest
    _refuse_other_content(folder, manifest)
    claim_folder(folder, is_cache_folder)
    make_folder(folder / SHARD_FOLDER)
    with build_lock(folder):
        remove_temporary_files(folder / SHARD_FOLDER)
        missing = _without(lambda shard: _is_here(folder, shard, manifest), manifest.shards)
        needed = sum(shard.bytes for shard in missing)
        check_space(folder, needed)
        with progress("pull", needed) as bar:
            _fetch(store, folder, missing, bar)
        # The digest does not cover the card that lies there, so it is written anew.
        if not (folder / CARD_NAME).exists():
            write_card(folder, manifest)
        if not (folder / MANIFEST_NAME).exists():
            with atomic_path(folder / MANIFEST_NAME) as temporary:
                temporary.write_bytes(found.data)
        release_claim(folder)
    return _result(str(folder), manifest, missing)


def _fetch(store: Store, folder: Path, shards: Sequence[ShardEntry], bar: Progress) -> None:
    run_all(lambda shard: fetch_shard(store, shard, folder, bar.add), shards, bar, JOBS)


def _refuse_other_content(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder with anything in it that is not this cache, before it is changed."""
    if not folder.is_dir():
        return
    if (folder / MANIFEST_NAME).exists():
        refuse_other(str(folder), read_manifest(folder), manifest, "choose another folder")
    elif not (folder / SHARD_FOLDER).is_dir() and any(
        not path.name.startswith(".") for path in folder.iterdir()
    ):
        raise CacheError(f"{folder}: not empty and no teacher cache; choose another folder")
    if (folder / SHARD_FOLDER).is_dir():
        names = [path.name for path in (folder / SHARD_FOLDER).iterdir()]
        _refuse_unlisted(str(folder / SHARD_FOLDER), names, manifest)


def _is_here(folder: Path, shard: ShardEntry, manifest: Manifest) -> bool:
    path = folder / SHARD_FOLDER / shard.name
    try:
        if path.stat().st_size == shard.bytes and sha256_file(path) == shard.sha256:
            return True
    except OSError:
        return False
    # A sound shard of something else is somebody's unfinished build: do not write over it.
    try:
        file = ShardFile(path)
        file.close()
    except CorruptCacheError:
        return False
    if (file.header.recipe, file.header.queries) != (manifest.recipe, manifest.queries):
        raise MismatchError(
            f"{path}: belongs to another, unfinished cache; choose another folder to pull into"
        )
    return False


def _result(place: str, manifest: Manifest, moved: Sequence[ShardEntry]) -> TransferResult:
    return TransferResult(
        place=place,
        manifest=manifest,
        moved_shards=len(moved),
        moved_bytes=sum(shard.bytes for shard in moved),
    )
