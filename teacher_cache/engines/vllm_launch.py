"""Start and end the process that owns vLLM, without a change to our own."""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import duet_unlearn

logger = logging.getLogger(__name__)

_EXIT_SECONDS = 12.0
"""Wait for an orderly end of the process before it is killed."""
_PROCESS = "duet_unlearn.teacher_cache.engines.vllm_process"


def start_process(
    theirs: Connection, log: IO[bytes], environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start the process that owns vLLM, with its end of the socket.

    What it writes goes to the log, or to standard error where debug messages are shown.
    """
    out = 2 if logger.isEnabledFor(logging.DEBUG) else log
    command = [sys.executable, "-P", "-m", _PROCESS, str(theirs.fileno())]
    with theirs:
        return subprocess.Popen(  # noqa: S603 - our own module, no shell
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=[theirs.fileno()],
            # Its own session: Ctrl-C reaches only us, and we can end it with all its children.
            start_new_session=True,
        )


def end_process(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    """Ask the process to end, and kill it with all its children if it does not."""
    with contextlib.suppress(OSError):
        connection.send(("stop",))
    connection.close()
    try:
        process.wait(timeout=_EXIT_SECONDS)
        # Its helpers tidy up shared memory once it is gone; they need a moment.
        for _ in range(20):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    except subprocess.TimeoutExpired:
        logger.debug("the vllm process did not end by itself")
    except ProcessLookupError:
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment_for(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of the process; what the user has set stays, but for the runner."""
    package = str(Path(duet_unlearn.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    on_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG" if logger.isEnabledFor(logging.DEBUG) else "WARNING",
        "OMP_NUM_THREADS": str(physical_cores()),
    }
    if not on_gpu:
        # One process in place of three, each of which would import vLLM for itself.
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Binding wants a NUMA node a worker, and would pile the engines of one machine up.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if options.get("enforce_eager", True) is True:
            # What little vLLM compiles in eager mode costs seconds and is not used here.
            defaults["TORCHDYNAMO_DISABLE"] = "1"
    forced = {
        # Logits processors of the kind we use belong to the first of vLLM's two model runners.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return {**defaults, **os.environ, **forced}


def physical_cores() -> int:
    """Return the physical cores this process may use: two threads of one core share its maths."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.is_file() else str(cpu))
    cores = len(siblings) or os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no control groups, or no limit
        pass
    return max(1, cores)
