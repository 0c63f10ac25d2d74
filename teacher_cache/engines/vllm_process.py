"""The process that owns vLLM: `python -m duet_unlearn.teacher_cache.engines.vllm_process FD`.

vLLM changes the process it runs in (environment, thread counts, signal handlers, CUDA), and its
start is slow because every process it spawns imports it anew. Here it gets one process of its
own; on a CPU the engine core and the worker run inside it, so that vLLM is imported once.

Speaks over one socket. In: the configuration, then `("prompts", [(row, ids), ...], new_tokens)`,
`("abort",)` and `("stop",)`. Out: `("ready", description)`, `("signals", Finished)`,
`("responses", (rows, token ids))` and `("failed", kind, reason)`.
"""

import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from duet_unlearn.teacher_cache.engines.base import cause
from duet_unlearn.teacher_cache.engines.vllm_start import (
    UnusableOptionError,
    describe,
    start_engine,
)

_EXIT_SECONDS = 10.0
"""Time for an orderly end, after which the whole process group is killed."""
_TAKE_EVERY = 8
"""Steps after which captured rows are fetched even if no request finished."""

Finished = tuple[list[int], list[int], Any, Any, Any, Any]
"""Rows, their lengths T, and over all their N positions: response `[N]` int32, ids `[N, K]` int32,
logits `[N, K]` float32, logsumexp `[N]` float32. One message a step costs far less than one a row.
"""
Position = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], np.float32]


class Capture:
    """Collects positions until their request is finished."""

    def __init__(self, engine: Any, top_k: int) -> None:
        self._engine = engine
        self._top_k = top_k
        self._open: dict[int, dict[int, Position]] = {}

    def open(self, row: int) -> None:
        """Expect signals of a row."""
        self._open[row] = {}

    def fetch(self) -> None:
        """Take over what the workers captured; later passes over a position replace earlier."""
        for parts in self._engine.collective_rpc("duet_take"):
            if not parts:
                continue
            rows, positions = (np.frombuffer(part, dtype=np.int64) for part in parts[:2])
            ids = np.frombuffer(parts[2], dtype=np.int32).reshape(-1, self._top_k)
            logits = np.frombuffer(parts[3], dtype=np.float32).reshape(-1, self._top_k)
            logsumexps = np.frombuffer(parts[4], dtype=np.float32)
            keys = zip(rows.tolist(), positions.tolist(), strict=True)
            for at, (row, position) in enumerate(keys):
                if row in self._open:  # else finished or aborted while vLLM ran one step ahead
                    self._open[row][position] = (ids[at], logits[at], logsumexps[at])

    def close(self, responses: dict[int, list[int]]) -> Finished:
        """Return the signals of finished rows, by the tokens each decoded.

        Raises:
            RuntimeError: A position is missing, or its strongest token is not the decoded one:
                captured rows and requests do not belong together.
        """
        positions: list[Position] = []
        for row, response_ids in responses.items():
            captured = self._open.pop(row)
            for position in range(len(response_ids)):
                if position not in captured:
                    raise RuntimeError(f"no logits were captured at position {position}")
                positions.append(captured[position])
        response_N = np.array([token for ids in responses.values() for token in ids], np.int32)
        ids_NK = np.stack([ids for ids, _, _ in positions])
        logits_NK = np.stack([logits for _, logits, _ in positions])
        logsumexp_N = np.array([logsumexp for _, _, logsumexp in positions], np.float32)
        # A greedy token has the largest logit: one of those tied with the first, if more than
        # one is. Where all K are tied, it may be one that did not fit.
        tied_NK = logits_NK == logits_NK[:, :1]
        found_N = (tied_NK & (ids_NK == response_N[:, None])).any(axis=1) | tied_NK.all(axis=1)
        if not (found_N | ~np.isfinite(logsumexp_N)).all():
            at = int(np.argmin(found_N))
            raise RuntimeError(
                f"captured logits rank {ids_NK[at, 0]} first where {response_N[at]} was decoded"
            )
        lengths = [len(ids) for ids in responses.values()]
        return list(responses), lengths, response_N, ids_NK, logits_NK, logsumexp_N

    def drop(self) -> list[int]:
        """Forget all open rows and return them."""
        rows = list(self._open)
        self._open.clear()
        return rows


class Host:
    """Runs vLLM and answers its owner."""

    def __init__(self, config: dict[str, Any], answers: "queue.SimpleQueue[Any]") -> None:
        self._config = config
        self._answers = answers
        self.engine, self.vllm_config = start_engine(config)
        self._capture = Capture(self.engine, config["top_k"])
        self._decoded: set[int] = set()  # rows that only decode
        self._check_capture()

    def add(self, prompts: list[tuple[int, list[int]]], new_tokens: int | None) -> None:
        """Queue prompts: to decode so many tokens, or to capture signals where that is None."""
        for row, ids in prompts:
            self._add(row, ids, new_tokens or self._config["positions"], capture=new_tokens is None)

    def _add(
        self, row: int, ids: list[int], positions: int, *, capture: bool = True, **options: Any
    ) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        from duet_unlearn.teacher_cache.engines.vllm_capture import ROW, TOP_K

        params = SamplingParams(
            temperature=0.0,
            max_tokens=positions,
            stop_token_ids=list(self._config["eos_token_ids"]),
            ignore_eos=True,  # only the ids above end a response
            detokenize=False,
            extra_args={ROW: row, TOP_K: self._config["top_k"]} if capture else None,
            **options,
        )
        if capture:
            self._capture.open(row)
        else:
            self._decoded.add(row)
        self.engine.add_request(str(row), tokens_input(ids), params)

    def abort(self) -> None:
        """Drop every request under way."""
        self.engine.abort_request([str(row) for row in [*self._capture.drop(), *self._decoded]])
        self._decoded.clear()

    def run(self, messages: "queue.SimpleQueue[Any]") -> None:
        """Serve until told to stop, or until the owner is gone."""
        steps = 0
        while True:
            idle = not self.engine.has_unfinished_requests()
            while idle or not messages.empty():
                message = messages.get()
                if message[0] == "stop":
                    return
                if message[0] == "abort":
                    self.abort()
                else:
                    self.add(*message[1:])
                idle = False
            if not self.engine.has_unfinished_requests():
                continue
            finished = [output for output in self.engine.step() if output.finished]
            steps += 1
            if finished or steps % _TAKE_EVERY == 0:
                self._capture.fetch()
            decoded = [output for output in finished if int(output.request_id) in self._decoded]
            captured = [output for output in finished if output not in decoded]
            if captured:
                self._answers.put(("signals", self._finish(captured)))
            if decoded:
                rows = [int(output.request_id) for output in decoded]
                self._decoded.difference_update(rows)
                answers = [list(output.outputs[0].token_ids) for output in decoded]
                self._answers.put(("responses", (rows, answers)))

    def _finish(self, outputs: list[Any]) -> Finished:
        return self._capture.close(
            {int(output.request_id): list(output.outputs[0].token_ids) for output in outputs}
        )

    def _check_capture(self) -> None:
        """Run one prompt both ways: what we capture must be vLLM's own raw logits.

        Raises:
            RuntimeError: This vLLM hands processors something else than raw logits.
        """
        kept = min(4, self._config["top_k"])
        self._add(-1, [0, 1, 2, 3], 1, logprobs=kept, flat_logprobs=True)
        outputs: list[Any] = []
        while not outputs:
            outputs = [output for output in self.engine.step() if output.finished]
        self._capture.fetch()
        *_, ids, logits, logsumexp = self._finish(outputs)
        flat = outputs[0].outputs[0].logprobs
        raw = dict(zip(flat.token_ids, flat.logprobs, strict=True))
        ours = dict(zip(ids[0].tolist(), logits[0].tolist(), strict=True))
        shared = [token for token in raw if token in ours]
        differ = max((abs(raw[token] - ours[token]) for token in shared), default=np.inf)
        if not differ <= 1e-5 * max(1.0, float(np.abs(logits).max())):
            raise RuntimeError(
                "this vLLM changes logits before custom logits processors see them "
                f"(by {differ:.3g} on a test prompt), so raw logits cannot be captured"
            )
        if abs(float(logsumexp[0])) < 1e-5:
            raise RuntimeError("this vLLM gives log-probabilities where raw logits were asked for")


def _listen(connection: Connection, messages: "queue.SimpleQueue[Any]", owner: int) -> None:
    """Pass messages on, and end this process group once the owner is gone or says stop."""
    message: tuple[Any, ...] = ("none",)
    while message[0] != "stop":
        try:
            # A forked sibling may hold the socket open after the owner died: look at both.
            while not connection.poll(2.0):
                if os.getppid() != owner:
                    raise EOFError
            message = connection.recv()
        except Exception:  # the owner's end of the socket is closed, or broke off half-way
            message = ("stop",)
        messages.put(message)
    time.sleep(_EXIT_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _answer(connection: Connection, answers: "queue.SimpleQueue[Any]") -> None:
    while (answer := answers.get()) is not None:
        try:
            connection.send(answer)
        except OSError:  # the owner is gone: `_listen` ends the process
            return


def main() -> None:
    """Serve one owner over the inherited socket."""
    connection = Connection(int(sys.argv[1]))
    owner = os.getppid()
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    config = connection.recv()
    threading.Thread(target=_listen, args=(connection, messages, owner), daemon=True).start()
    sender = threading.Thread(target=_answer, args=(connection, answers), daemon=True)
    sender.start()
    host = None
    try:
        try:
            import vllm  # noqa: F401
        except Exception as error:
            traceback.print_exc()
            answers.put(("failed", "import", cause(error)))
            return
        try:
            host = Host(config, answers)
            answers.put(("ready", describe(host.vllm_config, config["engine_args"])))
            host.run(messages)
        except UnusableOptionError as error:
            answers.put(("failed", "options", cause(error)))
        except Exception as error:
            traceback.print_exc()
            answers.put(("failed", "run" if host else "start", cause(error)))
    finally:
        answers.put(None)
        sender.join(timeout=_EXIT_SECONDS)
        if host is not None:
            host.engine.engine_core.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # vLLM leaves threads and, if it failed, half-built processes behind.
        os._exit(0)


if __name__ == "__main__":
    main()
