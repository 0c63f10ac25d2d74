"""Shards from elsewhere are decoded once in a process of its own, before any other reads them.

Parquet libraries believe what a file says: a few bytes can decode to gigabytes, and some footers
end the process. So a child with limits on memory and processor time decodes every row and applies
the format's rules. What passed is remembered by its digest for this version of pyarrow, so that
readers only have to check that the bytes are the same. See docs/decisions/0014.
"""

import contextlib
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from duet_unlearn.data.models.fingerprint import sha256_file, user_folder
from duet_unlearn.errors import CacheError, CorruptCacheError, OutputError
from duet_unlearn.files import make_folder, write_text
from duet_unlearn.teacher_cache.format.manifest import Manifest, ShardEntry
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.row_group import row_group_problems
from duet_unlearn.teacher_cache.format.schema import ROW_GROUP_LOGITS
from duet_unlearn.teacher_cache.format.shard import ShardFile

logger = logging.getLogger(__name__)

_MEMORY = 256 << 20
"""Address space beyond what the libraries take; a row group of the usual size needs half of it."""
# Ids, logits and what checking them needs beside them.
_BYTES_A_LOGIT = 40
_SECONDS, _BYTES_A_SECOND = 30, 5_000_000
_READY = "ready"


def ensure_sound(folder: Path, manifest: Manifest, shard: ShardEntry | None = None) -> None:
    """Check all shards of a cache, or one, unless that was done before.

    Raises:
        CorruptCacheError: A shard has other bytes than the manifest names, or breaks the format.
        CacheError: No process for the check can be started.
    """
    digest = manifest.digest if shard is None else shard.sha256
    if _is_known(manifest.digest) or _is_known(digest):
        return
    if shard is None:
        logger.info("%s: checking every row once, in a process of its own", folder)
    shards = [s for s in manifest.shards if not _is_known(s.sha256)] if shard is None else [shard]
    paths = [folder / entry.path for entry in shards]
    # A child that ends early has a problem at the shard it was at.
    for problem in find_problems(paths, manifest.recipe, [entry.sha256 for entry in shards]):
        if problem is not None:
            raise CorruptCacheError(problem)
    remember(digest)


def remember(digest: str) -> None:
    """Remember that a cache or a shard of this digest is sound."""
    mark = _mark(digest)
    try:
        make_folder(mark.parent)
        write_text(mark, "")
    except OutputError as error:
        logger.warning("%s (it is checked again the next time)", error)


def _is_known(digest: str) -> bool:
    return _mark(digest).is_file()


def _mark(digest: str) -> Path:
    # Another version of the library may fail where this one does not.
    folder = user_folder() / "verified" / f"pyarrow-{pa.__version__}"
    return folder / digest.removeprefix("sha256:")


def find_problems(
    paths: Sequence[Path],
    recipe: Recipe,
    hashes: Sequence[str] | None = None,
    *,
    queries: str | None = None,
) -> Iterator[str | None]:
    """Yield what is wrong with each shard, None where it is sound.

    Args:
        paths: Shards.
        recipe: Theirs; says how much memory a row may need.
        hashes: `sha256:<hex>` of each, where that is known.
        queries: Fingerprint of the set of queries that they should be of, where one is given. A
            shard of another one or of another recipe is then not decoded: its header tells.

    Raises:
        CacheError: No process for the check can be started.
    """
    expected: Sequence[str | None] = hashes or [None] * len(paths)
    waiting = list(zip(paths, expected, strict=True))
    while waiting:
        done = 0
        for problem in _in_child(waiting, recipe, queries):
            done += 1
            yield problem
        waiting = waiting[done:]


def _in_child(
    shards: Sequence[tuple[Path, str | None]], recipe: Recipe, queries: str | None
) -> Iterator[str | None]:
    """Yield what a child says of shards; it may end before the last of them."""
    memory = _MEMORY + _BYTES_A_LOGIT * max(0, recipe.top_k * recipe.positions - ROW_GROUP_LOGITS)
    size = sum(path.stat().st_size for path, _ in shards if path.is_file())
    seconds = _SECONDS + size // _BYTES_A_SECOND
    order = {
        "memory": memory,
        "seconds": seconds,
        "of": None if queries is None else [recipe.recipe_id, queries],
        "shards": [(str(path), expected) for path, expected in shards],
    }
    with subprocess.Popen(  # noqa: S603 our own module
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    ) as child:
        questions, answers = cast("IO[str]", child.stdin), cast("IO[str]", child.stdout)
        try:
            with contextlib.suppress(BrokenPipeError):
                questions.write(json.dumps(order))
                questions.close()
            started, answered = answers.readline().strip() == _READY, 0
            for line in answers:
                yield json.loads(line)
                answered += 1
            code = child.wait()
        finally:
            child.kill()
    if not started:
        raise CacheError(f"{shards[0][0]}: no process for checking it can be started (exit {code})")
    if answered < len(shards):
        why = f"reading it ends the process with {_ending(code)}"
        if _ending(code) in ("SIGKILL", "SIGXCPU"):
            why = f"reading it takes more than {seconds} s of processor time or is killed"
        yield f"{shards[answered][0]}: damaged shard ({why}); get the cache again"


def _ending(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


def _problem(path: Path, expected: str | None, of: list[str] | None) -> str | None:
    try:
        if expected is not None and (found := sha256_file(path)) != expected:
            return (
                f"{path}: its bytes have {found[:19]}, the manifest says {expected[:19]}; "
                "get the shard again"
            )
        file = ShardFile(path)
        if of is not None and [file.header.recipe.recipe_id, file.header.queries] != of:
            return None
        file.check_claims()
        for index, group in enumerate(file.row_groups()):
            for problem in row_group_problems(group, file.header.recipe):
                return f"{path}: row group {index}: {problem}; get the shard again"
        file.close()
    except CorruptCacheError as error:
        return str(error)
    except MemoryError:
        return (
            f"{path}: damaged shard (decodes to more than the format allows); get the cache again"
        )
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def _limit(memory: int, seconds: int) -> None:
    """Limit this process, where the system can."""
    pa.set_memory_pool(pa.system_memory_pool())  # the others reserve more than they use
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with contextlib.suppress(ImportError, OSError):
        import resource

        def lower(kind: int, soft: int, hard: int) -> None:
            allowed = resource.getrlimit(kind)[1]
            if allowed != resource.RLIM_INFINITY:
                soft, hard = min(soft, allowed), min(hard, allowed)
            resource.setrlimit(kind, (soft, hard))

        lower(resource.RLIMIT_CORE, 0, 0)
        lower(resource.RLIMIT_CPU, seconds, seconds + 5)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        lower(resource.RLIMIT_AS, limit, limit)


def main() -> None:
    """Read an order from standard input; print a line when ready, then one of JSON a shard."""
    order = json.load(sys.stdin)
    _limit(order["memory"], order["seconds"])
    _say(_READY)
    for path, expected in order["shards"]:
        _say(json.dumps(_problem(Path(path), expected, order["of"])))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
