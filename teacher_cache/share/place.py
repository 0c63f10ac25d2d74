"""What lies at a place where a cache is read from or copied to: another's files are never touched.

A manifest vouches for the shards beside it. Without one, a place is empty or holds byte for byte a
part of the very cache that is to come: only that proves that a copy was stopped there.
"""

from pathlib import Path
from urllib.parse import urlsplit

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError
from duet_unlearn.teacher_cache.format.card import CARD_NAME
from duet_unlearn.teacher_cache.format.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ShardEntry,
    decode_manifest,
    split_pin,
)
from duet_unlearn.teacher_cache.format.schema import MANIFEST_NAME, SHARD_FOLDER
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.urls import is_url, protocol_of, redact_url

_ANOTHER_PLACE = "choose another place for this cache, such as a new folder below it"


def parse_location(cache: str | Path) -> tuple[str, str | None]:
    """Split `PLACE[@sha256:DIGEST]` into a URL or a path, without a slash at its end, and the pin.

    Raises:
        CacheError: There is no place, the digest is not 64 hex digits, or no file name can be put
            behind the URL.
    """
    path, pin = split_pin(cache)
    if not is_url(cache):
        if not str(cache).partition("@sha256:")[0].strip():
            raise CacheError("no place is named; give a folder or a URL")
        return str(path), pin
    url = str(cache) if pin is None else str(cache).rpartition("@sha256:")[0]
    if "://" in url.partition("://")[2]:
        raise CacheError(f"{redact_url(url)}: chained URLs are not supported; give one of a folder")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise CacheError(f"{redact_url(url)}: not a URL; check it") from None
    if protocol_of(url) in ("http", "https") and (
        not parts.netloc or parts.query or parts.fragment
    ):
        raise CacheError(
            f"{redact_url(url)}: expected https://HOST/FOLDER without a query; a cache is several "
            "files below one URL"
        )
    return url.rstrip("/"), pin


def find_manifest(store: Store, folder: str = "") -> tuple[Manifest, bytes] | None:
    """Read a manifest and the bytes it was read from, or return None where there is none.

    Raises:
        CorruptCacheError: It is damaged, edited, too large or of another format version.
        CacheError: The store cannot be read.
    """
    name = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
    data = store.read(name, MAX_MANIFEST_BYTES)
    return None if data is None else (decode_manifest(data, store.where(name)), data)


def fetch_manifest(store: Store, pin: str | None) -> tuple[Manifest, bytes]:
    """Read the manifest of the cache at a place and check the digest it is pinned to.

    Raises:
        CacheError: There is no finished cache there.
        CorruptCacheError: Its manifest is damaged.
        MismatchError: It has another digest than `pin`.
    """
    found = find_manifest(store)
    if found is None:
        if not store.read_only and store.list(SHARD_FOLDER):
            raise CacheError(
                f"{store.url}: unfinished, no {MANIFEST_NAME}; push the cache again, it resumes"
            )
        raise CacheError(f"{store.url}: no teacher cache there, no {MANIFEST_NAME}; check the URL")
    if pin not in (None, found[0].digest):
        raise MismatchError(
            f"{store.url}: this cache has digest {found[0].digest}, expected {pin}; "
            "get the cache that was named, or change the digest"
        )
    return found


def holds_cache(store: Store, manifest: Manifest) -> bool:
    """Say whether this cache is finished at a place.

    Raises:
        MismatchError: Another one is; the message says in what they differ.
    """
    found = find_manifest(store)
    if found is None:
        return False
    if found[0].digest != manifest.digest:
        raise MismatchError(
            f"{store.url}: holds another cache; differs (there / here) in "
            f"{'; '.join(_differences(found[0], manifest))}; {_ANOTHER_PLACE}"
        )
    return True


def missing_shards(
    store: Store, manifest: Manifest, card: Path, *, finished: bool, check: bool
) -> list[ShardEntry]:
    """Return the shards that have to be copied to a place.

    Args:
        store: The place.
        manifest: Of the cache that is to be there.
        card: The card that will go with it.
        finished: Whether its manifest is there.
        check: Compare shards by content even then; else their sizes do.

    Raises:
        MismatchError: The place holds anything else.
        CacheError: The store cannot be read.
    """
    there = store.list(SHARD_FOLDER)
    listed = {shard.name for shard in manifest.shards}
    foreign = [f"{SHARD_FOLDER}/{n}" for n in there if n not in listed and n[:1] != "."]
    if not finished:
        foreign += [n for n in store.list() if n != SHARD_FOLDER and n[:1] != "."]
        if CARD_NAME in foreign and card.is_file() and _same_card(store, card):
            foreign.remove(CARD_NAME)
    missing = []
    for shard in manifest.shards:
        name = f"{SHARD_FOLDER}/{shard.name}"
        same = there.get(shard.name) == shard.bytes
        if same and (check or not finished):
            same = store.sha256(name, shard.bytes) == shard.sha256
        if not same and shard.name in there and not finished:
            foreign.append(name)
        if not same:
            missing.append(shard)
    if foreign:
        raise MismatchError(
            f"{store.url}: holds {min(foreign)[:80]!r}, which is not of this cache; perhaps "
            f"another one is being written there: {_ANOTHER_PLACE}, or remove it"
        )
    return missing


def _same_card(store: Store, card: Path) -> bool:
    try:
        return store.sha256(CARD_NAME, card.stat().st_size) == sha256_file(card)
    except CorruptCacheError:  # larger
        return False


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
