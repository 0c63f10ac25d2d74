"""Move the files of a cache, several at a time, with one bar over all bytes."""

import contextlib
import hashlib
import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duet_unlearn.errors import CacheError, CorruptCacheError
from duet_unlearn.files import atomic_path, make_folder
from duet_unlearn.teacher_cache.format.manifest import ShardEntry
from duet_unlearn.teacher_cache.format.schema import SHARD_FOLDER
from duet_unlearn.teacher_cache.share.store import Store

JOBS = 8


class Progress:
    """A bar in bytes that several threads move; quiet when standard error is not a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._bar: Any = tqdm(
            total=total, desc=what, unit="B", unit_scale=True, disable=None, mininterval=0.2
        )
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def add(self, count: int) -> None:
        """Count bytes; a negative number takes back what has to be moved again.

        Raises:
            CacheError: Another file failed or the user stopped, so this one has to stop too.
        """
        if self.stopped.is_set():
            raise CacheError("stopped because of another file")
        with self._lock:
            self._bar.update(count)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """Show a bar while files are moved; tell the threads to stop when it goes away."""
    bar = Progress(what, total)
    try:
        yield bar
    finally:
        bar.stopped.set()
        bar.close()


def run_all(
    work: Callable[[ShardEntry], object], shards: Sequence[ShardEntry], bar: Progress, jobs: int
) -> None:
    """Do the same for all shards, `jobs` at a time; the first error stops the rest and is raised.

    An interrupt does not wait for the others: their threads are daemons, which a process that ends
    leaves behind even where the network stands still.
    """
    waiting, errors = deque(shards), deque[BaseException]()

    def loop() -> None:
        while not bar.stopped.is_set():
            try:
                shard = waiting.popleft()
            except IndexError:
                return
            try:
                work(shard)
            except BaseException as error:
                errors.append(error)
                bar.stopped.set()

    threads = [
        threading.Thread(target=loop, name="duet-transfer", daemon=True)
        for _ in range(min(jobs, len(shards)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        bar.stopped.set()
        # aiohttp would report the connections that are dropped here on purpose.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    if errors:
        raise errors[0]


def fetch_shard(
    store: Store, shard: ShardEntry, folder: Path, count: Callable[[int], object] = lambda _: None
) -> None:
    """Bring a shard into a cache folder: hashed as it arrives, there whole or not at all.

    Args:
        store: Where the cache is.
        shard: The manifest's entry.
        folder: The local cache folder; its `shards/` exists.
        count: Called with the bytes of each piece that arrives.

    Raises:
        CorruptCacheError: Twice, what arrived was not what the manifest lists.
        CacheError: The store cannot be read, or the folder cannot be written.
    """
    name = f"{SHARD_FOLDER}/{shard.name}"
    for last in (False, True):
        try:
            with atomic_path(folder / name) as temporary:
                found = _receive(store.stream(name, shard.bytes), temporary, count)
                _check_received(store.where(name), found, shard)
            return
        except _WrongBytesError as error:
            if last:
                raise CorruptCacheError(str(error)) from None
            count(-error.received)


class _WrongBytesError(CorruptCacheError):
    """What arrived is not the shard; `received` bytes were counted for nothing."""

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.received = received


def _receive(
    pieces: Iterator[bytes], path: Path, count: Callable[[int], object]
) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            count(len(piece))
    return size, "sha256:" + digest.hexdigest()


def _check_received(where: str, found: tuple[int, str], shard: ShardEntry) -> None:
    size, sha256 = found
    if size != shard.bytes:
        problem = f"{'more than ' if size > shard.bytes else ''}{min(size, shard.bytes)} bytes"
        expected = f"{shard.bytes}"
    elif sha256 != shard.sha256:
        problem, expected = f"its bytes have {sha256[:19]}", shard.sha256[:19]
    else:
        return
    raise _WrongBytesError(
        f"{where}: {problem}, the manifest says {expected}; the copy there is damaged: push it "
        "again with --check",
        received=size,
    )


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what cannot fit on the disk.

    Raises:
        CacheError: The file system has less room than `needed` bytes.
    """
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"{folder}: {needed} bytes to fetch, {free} bytes free; free some space or choose "
            "another folder"
        )
