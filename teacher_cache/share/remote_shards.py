"""Shards of a remote cache, fetched ahead of their use and kept in a local folder by digest.

Several threads fetch in the order in which shards will be read; whoever needs one that is not
there fetches it on the spot. Every shard is hashed before it is used, one that was kept too.
Processes that share the folder (one a GPU) share the work through a lock a shard.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from filelock import FileLock

from duet_unlearn.data.models.fingerprint import sha256_file
from duet_unlearn.errors import DuetError
from duet_unlearn.files import TEMPORARY_SUFFIX, make_folder, write_error
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry
from duet_unlearn.teacher_cache.format.schema import SHARD_FOLDER
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.teacher_cache.share.transfer import fetch_shard

logger = logging.getLogger(__name__)

_JOBS = 4
# A reader that says nothing of its order gets the next shards in file order.
_READ_AHEAD = 2
_LOCK_FOLDER = ".locks"


class RemoteShards:
    """Makes the shards of one remote cache local.

    Args:
        open_store: Connects to the cache's store; called when the first shard has to be fetched.
        manifest: The cache's manifest.
        folder: Where shards are kept, in the layout of a cache.
        on_complete: Called once all shards are there.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        manifest: Manifest,
        folder: Path,
        on_complete: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder = folder
        self.fetched_bytes = 0
        self._open_store = open_store
        self._store: Store | None = None
        self._shards = manifest.shards
        self._on_complete = on_complete
        self._lock = threading.Lock()
        self._claims: dict[int, Future[None]] = {}
        self._order: list[int] = []
        self._workers = 0
        self._left = set(range(len(manifest.shards)))
        make_folder(folder / SHARD_FOLDER)
        make_folder(folder / _LOCK_FOLDER)

    def fetch(self, index: int) -> None:
        """Return once a shard is there and its bytes are those of the manifest.

        Raises:
            CorruptCacheError: What arrived is not the shard.
            CacheError: The store cannot be read, or the folder cannot be written.
        """
        future, mine = self._claim(index)
        if not mine and self._failed(future):
            # The background gave up some time ago; the network may be back.
            with self._lock:
                self._claims.pop(index, None)
            future, mine = self._claim(index)
        self._fetch_ahead(range(index + 1, min(index + 1 + _READ_AHEAD, len(self._shards))))
        if mine:
            self._run(index, future)
        future.result()

    @staticmethod
    def _failed(future: "Future[None]") -> bool:
        return future.done() and future.exception() is not None

    def prefetch(self, order: Iterable[int]) -> None:
        """Fetch shards in the background in this order, as fast as they come.

        Args:
            order: Indices of shards.
        """
        self._fetch_ahead(order, first=True)

    def stop(self) -> None:
        """Begin no further shards in the background."""
        with self._lock:
            self._order.clear()

    def _fetch_ahead(self, order: Iterable[int], *, first: bool = False) -> None:
        with self._lock:
            if first:
                self._order.clear()
            # Taken from the end.
            waiting = set(self._order)
            wanted = [i for i in order if i not in self._claims and i not in waiting]
            self._order[:] = (
                [*reversed(wanted), *self._order] if first else ([*self._order, *reversed(wanted)])
            )
            missing = min(_JOBS, len(self._order)) - self._workers
            self._workers += max(missing, 0)
        for _ in range(missing):
            # Daemons: a run that ends does not wait for shards that nobody reads.
            threading.Thread(target=self._work, name="duet-fetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._order:
                    self._workers -= 1
                    return
                index = self._order.pop()
            future, mine = self._claim(index)
            if mine:
                self._run(index, future)

    def _claim(self, index: int) -> tuple["Future[None]", bool]:
        with self._lock:
            known = self._claims.get(index)
            if known is not None:
                return known, False
            future: Future[None] = Future()
            self._claims[index] = future
            return future, True

    def _run(self, index: int, future: "Future[None]") -> None:
        try:
            self._make_local(self._shards[index])
        except BaseException as error:  # an interrupt too: somebody may wait for this shard
            logger.debug("shard %d: %s", index, error)
            future.set_exception(error)
            return
        future.set_result(None)
        with self._lock:
            self._left.discard(index)
            complete = not self._left
        if complete:
            try:
                self._on_complete()
            except DuetError as error:
                logger.warning("%s", error)

    def _make_local(self, shard: ShardEntry) -> None:
        path = self.folder / SHARD_FOLDER / shard.name
        try:
            with FileLock(self.folder / _LOCK_FOLDER / f"{shard.name}.lock"):
                if not self._is_kept(path, shard):
                    for left_behind in path.parent.glob(f".{shard.name}.*{TEMPORARY_SUFFIX}"):
                        left_behind.unlink()
                    fetch_shard(self._connected(), shard, self.folder, self._count)
        except OSError as error:
            raise write_error(path, error) from error

    @staticmethod
    def _is_kept(path: Path, shard: ShardEntry) -> bool:
        if not path.exists():
            return False
        if path.stat().st_size == shard.bytes and sha256_file(path) == shard.sha256:
            return True
        logger.warning("%s: damaged; fetching it again", path)
        return False

    def _connected(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = self._open_store()
            return self._store

    def _count(self, count: int) -> None:
        with self._lock:
            self.fetched_bytes += count
