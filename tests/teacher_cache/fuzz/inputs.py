"""Run mutated caches in one process, each against everything that reads a cache.

    python tests/teacher_cache/fuzz/inputs.py FIRST COUNT

Prints one JSON object a line: `{"input": N}` before an input and what came of it after it. The
process ends in the middle where an input crashes a library or hangs.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from base import write_base
from mutations import MUTATIONS

from duet_unlearn.errors import CacheError
from duet_unlearn.teacher_cache.build.row_source import RowSource
from duet_unlearn.teacher_cache.diff import diff
from duet_unlearn.teacher_cache.inspect import render_summary, summarize
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify

CHILD_SECONDS = 120.0
"""Processor time of the children of an input: three, each with its own limit of about 30 s."""
CHILD_RESIDENT = 1 << 30
"""Most resident memory of a child, in bytes; 256 MiB above its libraries for rows of usual size."""
MEMORY = 1 << 30
"""Address space beyond what the libraries take, in bytes."""
SECONDS = 5.0
"""Processor time above which a single input counts as a hang; sound ones take milliseconds."""
HANG = 900.0
"""Seconds after which an input that does not end is given up, on however busy a machine."""
RESIDENT = 192 << 20
"""Most resident memory that one input may take, in bytes; a sound cache decodes to kilobytes."""


def use(cache: Path) -> None:
    """Do what a user does with a cache that came from elsewhere."""
    render_summary(summarize(cache)).encode()
    report = verify(cache)
    "\n".join(report.problems).encode()
    json.dumps(diff(str(cache), str(cache)), ensure_ascii=False).encode()
    reader = CacheReader.open(cache)
    for index in range(reader.num_rows):
        reader.row(index)
    source = RowSource([reader])
    source.fetch([place for place, _ in source.scan()])


def run_input(number: int, bases: Sequence[Path], work: Path) -> tuple[str, str]:
    """Run one input; return its mutation and `accepted` or `refused`, or raise what was foreign."""
    rng = random.Random(number)
    mutation = rng.choices([m for m, _ in MUTATIONS], [weight for _, weight in MUTATIONS])[0]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(rng.choice(bases), work)
    mutation(work, rng)
    outcome = "accepted"
    started, in_children, before = time.process_time(), child_time(), peak_memory(restart=True)
    try:
        use(work)
    except CacheError as error:
        outcome = "refused"
        text = str(error)
        text.encode()
        if "\n" in text or any(word in text for word in ("alloc", "emory")):
            raise AssertionError(f"an allocation or two lines: {text[:300]}") from error
    taken, child = time.process_time() - started, child_time() - in_children
    grown = peak_memory() - before
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    if taken > SECONDS or child > CHILD_SECONDS or grown > RESIDENT or children > CHILD_RESIDENT:
        raise AssertionError(
            f"took {taken:.0f} s and {grown >> 20} MiB, its children {child:.0f} s and "
            f"{children >> 20} MiB"
        )
    return mutation.__name__, outcome


def child_time() -> float:
    """Return the processor time of all children that ended, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak_memory(*, restart: bool = False) -> int:
    """Return the most resident memory since the last restart, in bytes; 0 where unknown."""
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def main(first: int, count: int) -> None:
    """Run inputs in this process, with a limit on memory."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    os.environ["TQDM_DISABLE"] = "1"
    # A warning of a library would reach the user's terminal.
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DUET_CACHE_HOME"] = folder
        bases = [write_base(Path(folder) / dtype, dtype) for dtype in ("float16", "float32")]
        bases.append(write_base(Path(folder) / "ragged", "float32", top_p=0.5))
        bases.append(write_base(Path(folder) / "sampled", "float32", keep="sampled"))
        for base in bases:
            assert verify(base).problems == ()
            use(base)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in range(first, first + count):
            print(json.dumps({"input": number}), flush=True)
            faulthandler.dump_traceback_later(HANG, exit=True)
            try:
                mutation, outcome = run_input(number, bases, Path(folder) / "work")
                report = {"mutation": mutation, "outcome": outcome}
            except Exception:
                report = {"outcome": "failed", "why": traceback.format_exc(limit=-6)}
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
