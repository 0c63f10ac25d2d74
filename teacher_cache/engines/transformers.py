"""The transformers engine: plain batches, for machines without vLLM and as the oracle of it.

Shapes use B for rows, S for prompt tokens, V for the vocabulary, K for the tokens kept.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.errors import ConfigurationError, DuetError
from duet_unlearn.evaluation.answers import run_in_memory, stream_answers
from duet_unlearn.teacher_cache.engines.base import (
    EngineConfig,
    Prompt,
    cause,
    check_signal,
    is_given,
)
from duet_unlearn.teacher_cache.engines.options import check_options, published_options
from duet_unlearn.teacher_cache.engines.top_k import read_tokens, select_top_k
from duet_unlearn.teacher_cache.format.signal import Signal

_WINDOW = 1024
"""Prompts read ahead and sorted by length, so that a batch holds little padding."""
_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Most prompt tokens in a batch, padding included, by kind of device."""
_BATCH_LOGITS = 2**26
"""Most logits in a batch (256 MiB in float32)."""


class TransformersEngine:
    """Runs the teacher with `AutoModelForCausalLM`, on a GPU if there is one."""

    name = "transformers"
    continuous = False

    def __init__(self, config: EngineConfig) -> None:
        """Load the model; options are `TRANSFORMERS_OPTIONS`.

        Raises:
            ConfigurationError: `top_k` is larger than the vocabulary, an option is unusable, or the
                memory does not hold the model.
            DataError: The model does not load, or weights of it are missing.
        """
        import torch

        check_options(self.name, config.engine_args)
        self._config = config
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = _device(config.engine_args.get("device", default))
        self._model: Any = load_model(
            config.model,
            dtype=config.compute_dtype,
            device=str(self._device),
            trust_remote_code=config.trust_remote_code,
        )
        head: Any = self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
        width = head.weight.shape[0]
        if config.top_k > width:
            raise ConfigurationError(
                f"top_k is {config.top_k}, but {config.model} has a vocabulary of {width}; "
                "lower --top-k"
            )
        most_rows = config.engine_args.get("batch_rows", _WINDOW)
        self._batch_positions = max(1, _BATCH_LOGITS // width)
        self._batch_rows = min(most_rows, self._batch_positions)
        known = inspect.signature(self._model.forward).parameters
        # Without explicit position ids a left-padded row would be read at wrong positions.
        self._can_pad = "position_ids" in known
        self._keeps = "logits_to_keep" in known

    def signals(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Signal]]:
        """Yield `(index, signal)` batch by batch; see `Engine.signals`.

        Raises:
            ConfigurationError: The memory does not hold one prompt.
            DuetError: The model fails.
        """
        source = iter(prompts)
        while window := list(itertools.islice(source, _WINDOW)):
            window.sort(key=_length)
            for kind in sorted({len(prompt) for prompt in window}):
                for batch in self._batches([prompt for prompt in window if len(prompt) == kind]):
                    yield from self._run(batch, given=is_given(batch[0]))

    def responses(
        self, prompts: Iterable[Prompt], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield `(index, token ids)` of greedy answers; see `Engine.responses`."""
        source = iter(prompts)
        while window := list(itertools.islice(source, _WINDOW)):
            for number, ids in stream_answers(
                self._model,
                [prompt[1] for prompt in window],
                eos_token_ids=self._config.eos_token_ids,
                max_new_tokens=max_new_tokens,
                batch_size=self._batch_rows,
            ):
                yield window[number][0], ids

    def _batches(self, prompts: list[Prompt]) -> Iterator[list[Prompt]]:
        batch: list[Prompt] = []
        most = _BATCH_TOKENS[self._device.type]
        for prompt in prompts:
            length = _length(prompt)  # the longest so far: prompts come sorted
            full = len(batch) == self._batch_rows or (len(batch) + 1) * length > most
            if is_given(prompt):
                held = (len(batch) + 1) * max(sum(map(len, p[2:3])) for p in (*batch, prompt))
                full = full or held > self._batch_positions
            mixed = not self._can_pad and batch and _length(batch[0]) != length
            if batch and (full or mixed):
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    def _run(self, batch: list[Prompt], *, given: bool) -> Iterator[tuple[int, Signal]]:
        def compute(part: Sequence[Prompt]) -> list[Signal]:
            if given:
                return self._score([prompt[1:] for prompt in part])
            return self._decode([prompt[1] for prompt in part])

        try:
            signals = run_in_memory(compute, batch, _length)
        except ConfigurationError:
            raise
        except Exception as error:
            raise DuetError(
                f"transformers engine: {self._config.model} failed on a batch of {len(batch)} "
                f"prompts: {cause(error)}"
            ) from error
        for prompt, signal in zip(batch, signals, strict=True):
            found = check_signal(signal, config=self._config, engine=self.name, given=given)
            yield prompt[0], found

    def _decode(self, prompts: list[Sequence[int]]) -> list[Signal]:
        """Decode greedily until every row ended or has all its positions."""
        import torch

        ids_BS, mask_BS = self._padded(prompts)
        ended_B = np.zeros(len(prompts), dtype=bool)
        lengths_B = np.zeros(len(prompts), dtype=np.int64)
        steps: list[tuple[Any, Any, Any]] = []
        past = None
        with torch.inference_mode():
            while True:
                logits_BSV, past = self._forward(
                    ids_BS, mask_BS, past, keep=1, goes_on=self._config.positions > 1
                )
                steps.append(self._select(logits_BSV[:, -1]))
                greedy_B = steps[-1][0][:, 0]
                lengths_B += ~ended_B
                ended_B |= np.isin(greedy_B, self._config.eos_token_ids)
                if ended_B.all() or len(steps) == self._config.positions:
                    break
                ids_BS = torch.from_numpy(greedy_B[:, None].astype(np.int64)).to(self._device)
                mask_BS = torch.cat([mask_BS, torch.ones_like(ids_BS)], dim=1)
        ids, logits, logsumexp = (np.stack(parts, axis=1) for parts in zip(*steps, strict=True))
        return [
            Signal(
                response_ids=ids[row, :length, 0].copy(),
                token_ids=ids[row, :length].copy(),
                logits=logits[row, :length].copy(),
                logsumexp=logsumexp[row, :length].copy(),
            )
            for row, length in enumerate(lengths_B)
        ]

    def _score(self, asked: list[Any]) -> list[Signal]:
        """Read prompts with their responses, and keep what predicts the responses' tokens.

        Of a third entry, tokens `[T, K]`, those are kept in place of the strongest.

        The last positions of all rows are in the last columns. They are read some at a time, so
        that memory holds few logits.
        """
        import torch

        ids_BS, mask_BS = self._padded([[*prompt, *given[:-1]] for prompt, given, *_ in asked])
        rows, length = ids_BS.shape
        positions = max(len(given) for _, given, *_ in asked)
        named_BTK = _named([row[2:] for row in asked], positions, self._config.top_k)
        keep = min(positions, max(1, self._batch_positions // rows))
        start, stop, past, done = 0, length - positions + keep, None, 0
        found: list[tuple[Any, ...]] = []
        with torch.inference_mode():
            while start < length:
                logits_BSV, past = self._forward(
                    ids_BS[:, start:stop], mask_BS[:, :stop], past, keep, goes_on=stop < length
                )
                named = named_BTK if named_BTK is None else named_BTK[:, done : done + keep]
                flat = self._select(logits_BSV[:, -keep:].flatten(0, 1), named)
                done += keep
                found.append(tuple(part.reshape(rows, -1, *part.shape[1:]) for part in flat))
                start, stop, keep = stop, min(stop + keep, length), min(keep, length - stop)
        ids, logits, logsumexp = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
        return [
            Signal(
                response_ids=np.array(given, dtype=np.int32),
                token_ids=ids[row, -len(given) :].copy(),
                logits=logits[row, -len(given) :].copy(),
                logsumexp=logsumexp[row, -len(given) :].copy(),
            )
            for row, (_, given, *_) in enumerate(asked)
        ]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Return token ids and mask, `[B, S]`, padded on the left."""
        import torch

        longest = max(map(len, rows))
        ids = [[0] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)

    def _select(self, logits_BV: Any, named: Any = None) -> tuple[Any, ...]:
        logits_BV = logits_BV.float()
        if named is None:
            found = select_top_k(logits_BV, self._config.top_k)
        else:
            found = read_tokens(logits_BV, named.flatten(0, 1))
        return tuple(tensor.cpu().numpy() for tensor in found)

    def _forward(
        self, ids_BS: Any, mask_BS: Any, past: Any, keep: int, *, goes_on: bool
    ) -> tuple[Any, Any]:
        """Return logits `[B, ..., V]` of at least the last `keep` tokens, and the KV cache."""
        inputs: dict[str, Any] = {"input_ids": ids_BS, "attention_mask": mask_BS}
        if self._can_pad:
            positions_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BS[:, -ids_BS.shape[1] :]
        if self._keeps:
            inputs["logits_to_keep"] = keep
        output = self._model(**inputs, past_key_values=past, use_cache=goes_on or past is not None)
        return output.logits, output.get("past_key_values")

    def describe(self) -> dict[str, Any]:
        """Return engine, versions, device and settings, as JSON values."""
        import torch
        import transformers

        on_gpu = self._device.type == "cuda"
        options = self._config.engine_args
        return {
            "engine": self.name,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "device": torch.cuda.get_device_name(self._device) if on_gpu else "cpu",
            "settings": {
                "dtype": self._config.compute_dtype,
                "attention": self._model.config._attn_implementation,
                "batch_rows": self._batch_rows,
                "batch_tokens": _BATCH_TOKENS[self._device.type],
                **({} if on_gpu else {"threads": torch.get_num_threads()}),
            },
            **({"options": published_options(options)} if options else {}),
        }

    def close(self) -> None:
        """Free the model; safe to call twice."""
        import torch

        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _length(prompt: Prompt) -> int:
    """Tokens that are read, of a given response too, whose last token only follows."""
    return sum(map(len, prompt[1:3])) - is_given(prompt)


def _named(rows: list[Any], positions: int, top_k: int) -> Any:
    """Return the tokens to read, `[B, T, K]`, last positions last; None where none are named."""
    import torch

    if not rows[0]:
        return None
    named_BTK = torch.zeros((len(rows), positions, top_k), dtype=torch.int64)
    for named_TK, [ids] in zip(named_BTK, rows, strict=True):
        named_TK[-len(ids) :] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    return named_BTK


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"transformers engine: device {name!r} is unknown; give cpu, cuda or cuda:N"
        ) from error
    if device.type not in _BATCH_TOKENS:
        raise ConfigurationError(
            f"transformers engine: device {name!r}, expected cpu, cuda or cuda:N"
        )
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise ConfigurationError(
            f"transformers engine: device {name!r}, but PyTorch finds {found} GPUs here"
        )
    return device
