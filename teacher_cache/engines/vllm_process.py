"""The process that owns vLLM: `python -m duet_unlearn.teacher_cache.engines.vllm_process FD`.

vLLM changes the process it runs in (environment, thread counts, signal handlers, CUDA), and its
start is slow because every process it spawns imports it anew. Here it gets one process of its
own; on a CPU the engine core and the worker run inside it, so that vLLM is imported once.

It reads from the socket FD an `EngineConfig`, then `([(row, prompt ids), ...], new tokens)`, where
further entries of a row are those of `Prompt`, or None to drop what is under way, until the socket
is closed. It sends `("ready", description)`, then `("finished", Finished)` after each step that
ended requests; or `("failed", kind, reason)`.
"""

import contextlib
import dataclasses
import difflib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from duet_unlearn.data.models.folder import context_length, read_config
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.engines.base import EngineConfig, Prompt, cause
from duet_unlearn.teacher_cache.engines.options import published_options

_CAPTURE = "duet_unlearn.teacher_cache.engines.vllm_capture"
_CPU_BLOCK = 32
"""Tokens in a KV block on a CPU: vLLM's default of 128 never reuses a short steering prefix."""
_EXIT_SECONDS = 10.0
"""Time for an orderly end without owner, after which the whole process group is killed."""
_FETCH_EVERY = 8
"""Steps after which captured rows are fetched even if no request finished."""

Finished = tuple[list[int], list[list[int]], tuple[Any, Any, Any] | None]
"""Rows, the tokens that each decoded or was given, and over all their N positions ids `[N, K]`
int32, logits `[N, K]` float32, logsumexp `[N]` float32; None for answers. One message a step costs
far less than one a row."""
Position = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], np.float32]


def start_engine(config: EngineConfig) -> tuple[Any, Any]:
    """Return the running `LLMEngine` and the configuration it resolved.

    Raises:
        ConfigurationError: This vLLM has no option of that name, or does not take its value.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    given = config.engine_args
    _check_names(given, [field.name for field in dataclasses.fields(EngineArgs)])
    on_cpu = current_platform.is_cpu()
    options: dict[str, Any] = {
        "model": str(config.model),
        "dtype": config.compute_dtype,
        "max_model_len": _max_model_len(config),
        "trust_remote_code": config.trust_remote_code,
        "seed": 0,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # the folder's may bring penalties
        "logprobs_mode": "raw_logits",
        "logits_processors": [f"{_CAPTURE}:CaptureProcessor"],
        "worker_extension_cls": f"{_CAPTURE}.CaptureExtension",
        "disable_log_stats": True,
    }
    if on_cpu:
        # Compiling takes the CPU backend 40 s and wins nothing measurable on short prompts.
        options |= {"block_size": _CPU_BLOCK, "enforce_eager": True}
        _load_model_class(config.model)
    try:
        vllm_config = EngineArgs(**{**options, **given}).create_engine_config()
    except Exception as error:
        if not given:
            raise
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigurationError(f"vLLM does not take {shown}: {cause(error)}") from error
    if on_cpu and vllm_config.cache_config.kv_cache_memory_bytes is None:
        vllm_config.cache_config.kv_cache_memory_bytes = _cpu_kv_bytes(vllm_config)
    return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True), vllm_config


def _check_names(given: Any, known: list[str]) -> None:
    import vllm

    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]}?" if close else "see vLLM's engine arguments"
            raise ConfigurationError(f"vLLM {vllm.__version__} has no option {name}; {advice}")


def _max_model_len(config: EngineConfig) -> int:
    """Return room for prompt and answer in whole KV blocks, as far as the context allows."""
    needed = config.max_prompt_tokens + max(config.positions, config.max_new_tokens)
    rounded = -(-needed // 64) * 64
    context = context_length(read_config(config.model))
    return rounded if context is None else max(needed, min(rounded, context))


def _load_model_class(folder: Path) -> None:
    """Import the model's class here and now.

    vLLM looks at a class for the first time in a process of its own, so that CUDA stays
    untouched. On a CPU that only costs another import of vLLM.
    """
    from vllm import ModelRegistry

    # Only a short cut: where it fails, vLLM goes its own way and says what is wrong.
    with contextlib.suppress(Exception):
        for name in json.loads((folder / "config.json").read_text())["architectures"]:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _cpu_kv_bytes(vllm_config: Any) -> int:
    """Return room for every running sequence at full length, within a quarter of free memory.

    vLLM would take most of the machine's memory, which a CPU shares with everything else.
    """
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    numbers = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    token = numbers * model.get_head_size() * model.dtype.itemsize
    block = vllm_config.cache_config.block_size
    blocks = -(-model.max_model_len // block) * vllm_config.scheduler_config.max_num_seqs + 16
    free = get_memory_node_info(get_visible_memory_node()[0]).available_memory
    return int(max(64 * 2**20, min(blocks * block * token, free // 4)))


class Host:
    """Runs vLLM for its owner: one stream of prompts at a time, all to capture or all to decode."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine, self._vllm_config = start_engine(config)
        self._open: dict[int, tuple[Prompt, dict[int, Position] | None]] = {}
        """Rows under way: what was asked, and what was captured of each by position; None for one
        that only decodes."""
        self._engine.collective_rpc("duet_watch")
        self._check_capture()

    def serve(self, connection: Connection, answer: Callable[[Any], object]) -> None:
        """Work until the owner closes the connection or is gone."""
        steps = 0
        while True:
            idle = not self._engine.has_unfinished_requests()
            while idle or connection.poll():
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    return
                if message is None:
                    self._engine.abort_request([str(row) for row in self._open])
                    self._open.clear()
                else:
                    prompts, new_tokens = message
                    for prompt in itertools.starmap(Prompt, prompts):
                        self._add(prompt, new_tokens)
                idle = not self._engine.has_unfinished_requests()
            finished = [output for output in self._engine.step() if output.finished]
            steps += 1
            # A step along given responses captures many positions.
            has_given = any(prompt.given is not None for prompt, _ in self._open.values())
            if finished or has_given or steps % _FETCH_EVERY == 0:
                self._fetch()
            if finished:
                answer(("finished", self._finish(finished)))

    def _add(self, prompt: Prompt, new_tokens: int | None, **options: Any) -> None:
        """Queue a prompt: to decode so many tokens, or to capture signals where that is None."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        from duet_unlearn.teacher_cache.engines import vllm_capture as names

        row, ids, given, named, seed, keep = prompt
        capture = new_tokens is None
        own = {names.KEEP: keep, names.TOP_K: self._config.top_k}
        params: dict[str, Any] = {
            "temperature": 0.0,  # the processor leaves a token that is drawn as the only one
            "max_tokens": self._config.positions if capture else new_tokens,
            "stop_token_ids": list(self._config.eos_token_ids),
            "ignore_eos": True,  # only the ids above end a response
            "detokenize": False,
            "extra_args": own | {names.ROW: row} if capture else None,
        }
        if seed is not None:
            params["extra_args"][names.DRAWS] = (seed, self._config.temperature)
        if given is not None:
            ids = [*ids, *given[:-1]]
            params |= {
                "max_tokens": 1,
                # What is read from the cache has no hidden states.
                "skip_reading_prefix_cache": True,
                "extra_args": {
                    names.GIVEN: (row, len(given)),
                    names.NAMED: named,
                    **own,
                },
            }
        self._open[row] = prompt, {} if capture else None
        self._engine.add_request(
            str(row), tokens_input(list(ids)), SamplingParams(**params | options)
        )

    def _fetch(self) -> None:
        """Take over what the workers captured; later passes over a position replace earlier."""
        for parts in self._engine.collective_rpc("duet_take"):
            if not parts:
                continue
            rows, positions = (np.frombuffer(part, dtype=np.int64).tolist() for part in parts[:2])
            ids = np.frombuffer(parts[2], dtype=np.int32).reshape(len(rows), -1)
            logits = np.frombuffer(parts[3], dtype=np.float32).reshape(len(rows), -1)
            logsumexps = np.frombuffer(parts[4], dtype=np.float32)
            found = zip(ids, logits, logsumexps, strict=True)
            for row, position, captured in zip(rows, positions, found, strict=True):
                # A row may have finished or been dropped while vLLM ran one step ahead.
                _, kept = self._open.get(row, (None, None))
                if kept is not None:
                    kept[position] = captured

    def _finish(self, outputs: list[Any]) -> Finished:
        """Return what finished requests decoded and captured.

        Raises:
            RuntimeError: A position is missing, or its strongest token is not the decoded one:
                captured rows and requests do not belong together.
        """
        rows = [int(output.request_id) for output in outputs]
        prompts, kept = zip(*map(self._open.pop, rows), strict=True)
        answers = [
            list(output.outputs[0].token_ids if prompt.given is None else prompt.given)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        positions: list[Position] = []
        for captured, answer in zip(kept, answers, strict=True):
            if captured is None:
                return rows, answers, None
            if missing := set(range(len(answer))) - captured.keys():
                raise RuntimeError(f"no logits were captured at position {min(missing)}")
            positions += [captured[position] for position in range(len(answer))]
        ids_NK, logits_NK, logsumexp_N = map(np.stack, zip(*positions, strict=True))
        decoded_N = np.array([token for answer in answers for token in answer])
        # A greedy token has the largest logit: one of those tied with the first, if more than
        # one is. Where all K are tied, it may be one that did not fit. Others may be any.
        tied_NK = logits_NK == logits_NK[:, :1]
        found_N = (tied_NK & (ids_NK == decoded_N[:, None])).any(axis=1) | tied_NK.all(axis=1)
        lengths = [len(answer) for answer in answers]
        is_free = [prompt.given is not None or prompt.seed is not None for prompt in prompts]
        found_N |= np.repeat(is_free, lengths)
        # Of sampled ones, that with more than half of the draws.
        is_sampled = [prompt.keep is not None for prompt in prompts]
        is_unsure_N = np.exp(logits_NK[:, 0]) <= logits_NK.shape[1] / 2 + 1
        found_N |= is_unsure_N & np.repeat(is_sampled, lengths)
        if not (found_N | ~np.isfinite(logsumexp_N)).all():
            at = int(np.argmin(found_N))
            raise RuntimeError(
                f"captured logits rank {ids_NK[at, 0]} first where {decoded_N[at]} was decoded"
            )
        return rows, answers, (ids_NK, logits_NK, logsumexp_N)

    def _check_capture(self) -> None:
        """Run one prompt both ways: what we capture must be vLLM's own raw logits.

        Raises:
            RuntimeError: This vLLM hands processors something else than raw logits.
        """
        asked = min(4, self._config.top_k)
        options: dict[str, Any] = {"max_tokens": 1, "logprobs": asked, "flat_logprobs": True}
        output, captured = self._run_alone(Prompt(-1, [0, 1, 2, 3]), **options)
        [ids], [logits], [logsumexp] = (array.tolist() for array in captured)
        flat = output.outputs[0].logprobs
        raw = dict(zip(flat.token_ids, flat.logprobs, strict=True))
        ours = dict(zip(ids, logits, strict=True))
        differ = max((abs(raw[t] - ours[t]) for t in raw.keys() & ours.keys()), default=np.inf)
        if not differ <= 1e-5 * max(1.0, *map(abs, logits)):
            raise RuntimeError(
                "this vLLM changes logits before custom logits processors see them "
                f"(by {differ:.3g} on a test prompt), so raw logits cannot be captured"
            )
        if abs(logsumexp) < 1e-5:
            raise RuntimeError("this vLLM gives log-probabilities where raw logits were asked for")
        _, along = self._run_alone(Prompt(-1, [0, 1], [2, 3, 0]))
        if not abs(float(along[2][-1]) - logsumexp) <= 1e-3 * max(1.0, abs(logsumexp)):
            raise RuntimeError(
                "this vLLM hands over other hidden states than those it samples from"
            )

    def _run_alone(self, prompt: Prompt, **options: Any) -> tuple[Any, tuple[Any, Any, Any]]:
        """Return vLLM's output for one prompt, and what was captured of it."""
        self._add(prompt, None, **options)
        outputs: list[Any] = []
        while not outputs:
            outputs = [output for output in self._engine.step() if output.finished]
        self._fetch()
        captured = self._finish(outputs)[2]
        assert captured is not None  # noqa: S101 - the prompt asked for it
        return outputs[0], captured

    def describe(self) -> dict[str, Any]:
        """Return what may move the last bits of a logit, and the options that the user gave."""
        import torch
        import transformers
        import vllm
        from vllm.platforms import current_platform

        cache, scheduler = self._vllm_config.cache_config, self._vllm_config.scheduler_config
        parallel, model = self._vllm_config.parallel_config, self._vllm_config.model_config
        on_cpu = current_platform.is_cpu()
        options = self._config.engine_args
        return {
            "engine": "vllm",
            "versions": {lib.__name__: lib.__version__ for lib in (vllm, torch, transformers)},
            "device": "cpu" if on_cpu else current_platform.get_device_name(),
            "settings": {
                "dtype": str(model.dtype).removeprefix("torch."),
                "block_size": cache.block_size,
                "prefix_caching": bool(cache.enable_prefix_caching),
                "max_model_len": model.max_model_len,
                "max_num_seqs": scheduler.max_num_seqs,
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "enforce_eager": bool(model.enforce_eager),
                "tensor_parallel_size": parallel.tensor_parallel_size,
                "pipeline_parallel_size": parallel.pipeline_parallel_size,
                **({"threads": torch.get_num_threads()} if on_cpu else {}),
            },
            **({"options": published_options(options)} if options else {}),
        }

    def shut_down(self) -> None:
        """End vLLM's own processes."""
        self._engine.engine_core.shutdown()


def _end_with(owner: int) -> None:
    """Kill this process group some time after the owner died, whatever vLLM is busy with."""
    while os.getppid() == owner:
        time.sleep(2.0)
    time.sleep(_EXIT_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve one owner over the inherited socket."""
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Sends in its own thread: an owner that is slow to read must not hold up vLLM.
    sender = ThreadPoolExecutor(max_workers=1)
    host, stage = None, "import"
    try:
        import vllm  # noqa: F401

        stage = "start"
        host = Host(connection.recv())
        sender.submit(connection.send, ("ready", host.describe()))
        stage = "run"
        host.serve(connection, lambda finished: sender.submit(connection.send, finished))
    except Exception as error:
        traceback.print_exc()
        kind = "options" if isinstance(error, ConfigurationError) else stage
        sender.submit(connection.send, ("failed", kind, cause(error)))
    finally:
        sender.shutdown()
        if host is not None:
            host.shut_down()
        sys.stdout.flush()
        sys.stderr.flush()
        # vLLM leaves threads and, if it failed, half-built processes behind.
        os._exit(0)


if __name__ == "__main__":
    main()
