"""The transformers engine: plain batches, for machines without vLLM and as the oracle of it.

Shapes use B for rows, S for prompt tokens, V for the vocabulary, K for the tokens kept.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.errors import ConfigurationError, DuetError
from duet_unlearn.evaluation.answers import pad, run_in_memory, stream_answers
from duet_unlearn.teacher_cache.engines.base import (
    AnyPrompt,
    EngineConfig,
    Prompt,
    cause,
    check_signal,
)
from duet_unlearn.teacher_cache.engines.options import check_options, published_options
from duet_unlearn.teacher_cache.engines.sampling import draw_tokens, sample_top_k, uniforms
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

    def signals(self, prompts: Iterable[AnyPrompt]) -> Iterator[tuple[int, Signal]]:
        """Yield `(index, signal)` batch by batch; see `Engine.signals`.

        Raises:
            ConfigurationError: The memory does not hold one prompt.
            DuetError: The model fails.
        """
        source = itertools.starmap(Prompt, prompts)
        while window := sorted(itertools.islice(source, _WINDOW), key=_length):
            for kind in sorted(set(map(_kind, window))):
                for batch in self._batches([prompt for prompt in window if _kind(prompt) == kind]):
                    yield from self._run(batch)

    def responses(
        self, prompts: Iterable[AnyPrompt], max_new_tokens: int
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
            if prompt.given is not None:
                held = (len(batch) + 1) * max(len(p.given or ()) for p in (*batch, prompt))
                full = full or held > self._batch_positions
            elif self._config.positions > 1:  # whose keys and values are kept while it decodes
                reach = length + self._config.positions
                full = full or (len(batch) + 1) * reach > 4 * most
            mixed = not self._can_pad and batch and _length(batch[0]) != length
            if batch and (full or mixed):
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    def _run(self, batch: list[Prompt]) -> Iterator[tuple[int, Signal]]:
        run = self._decode if batch[0].given is None else self._score
        try:
            signals = run_in_memory(run, batch, _length)
        except ConfigurationError:
            raise
        except Exception as error:
            raise DuetError(
                f"transformers engine: {self._config.model} failed on a batch of {len(batch)} "
                f"prompts: {cause(error)}"
            ) from error
        for prompt, signal in zip(batch, signals, strict=True):
            yield prompt.number, check_signal(signal, prompt, self._config, self.name)

    def _decode(self, prompts: Sequence[Prompt]) -> list[Signal]:
        """Decode, or draw what has a seed, until every row ended or has all its positions."""
        most, top_k = self._config.positions, self._config.top_k
        drawn = [row for row, prompt in enumerate(prompts) if prompt.seed is not None]
        uniform_DT = [uniforms(prompts[row].seed or 0, most) for row in drawn]
        keep_BT = _keep(prompts, most)
        ids_BS, mask_BS = pad([prompt.ids for prompt in prompts], self._device, left=True)
        ended_B = np.zeros(len(prompts), dtype=bool)
        lengths_B = np.zeros(len(prompts), dtype=np.int64)
        steps: list[tuple[Any, Any, Any]] = []
        tokens: list[Any] = []
        past = None
        with torch.inference_mode():
            while True:
                logits_BSV, past = self._forward(ids_BS, mask_BS, past, keep=1, goes_on=most > 1)
                keep_B = None if keep_BT is None else keep_BT[:, len(steps)]
                steps.append(self._select(logits_BSV[:, -1], top_k, keep_B=keep_B))
                # The most drawn token need not be the strongest.
                strongest = steps[-1] if keep_B is None else self._select(logits_BSV[:, -1], 1)
                tokens.append(strongest[0][:, 0].copy())
                if drawn:
                    uniform_D = [uniform_T[len(steps) - 1] for uniform_T in uniform_DT]
                    logits_DV = logits_BSV[drawn, -1].float()
                    found_D = draw_tokens(logits_DV, uniform_D, self._config.temperature)
                    tokens[-1][drawn] = found_D.cpu().numpy()
                lengths_B += ~ended_B
                ended_B |= np.isin(tokens[-1], self._config.eos_token_ids)
                if ended_B.all() or len(steps) == most:
                    break
                ids_BS = torch.from_numpy(tokens[-1][:, None].astype(np.int64)).to(self._device)
                mask_BS = torch.cat([mask_BS, torch.ones_like(ids_BS)], dim=1)
        found = [np.stack(parts, axis=1) for parts in zip(*steps, strict=True)]
        responses = [
            ids_T[:n] for ids_T, n in zip(np.stack(tokens, axis=1), lengths_B, strict=True)
        ]
        return _signals(responses, found, [slice(n) for n in lengths_B])

    def _score(self, prompts: Sequence[Prompt]) -> list[Signal]:
        """Read prompts with their responses, and keep what predicts the responses' tokens.

        The last positions of all rows are in the last columns. They are read some at a time, so
        that memory holds few logits.
        """
        responses = [prompt.given or () for prompt in prompts]
        whole = zip(prompts, responses, strict=True)
        texts = [[*prompt.ids, *given[:-1]] for prompt, given in whole]
        ids_BS, mask_BS = pad(texts, self._device, left=True)
        rows, length = ids_BS.shape
        positions, top_k = max(map(len, responses)), self._config.top_k
        named_BTK, keep_BT = _named(prompts, positions, top_k), _keep(prompts, positions)
        keep = min(positions, max(1, self._batch_positions // rows))
        start, stop, past, done = 0, length - positions + keep, None, 0
        found: list[tuple[Any, ...]] = []
        with torch.inference_mode():
            while start < length:
                logits_BSV, past = self._forward(
                    ids_BS[:, start:stop], mask_BS[:, :stop], past, keep, goes_on=stop < length
                )
                named, keep_B = (
                    part if part is None else part[:, done : done + keep].flatten(0, 1)
                    for part in (named_BTK, keep_BT)
                )
                flat = self._select(logits_BSV[:, -keep:].flatten(0, 1), top_k, named, keep_B)
                done += keep
                found.append(tuple(part.reshape(rows, -1, *part.shape[1:]) for part in flat))
                start, stop, keep = stop, min(stop + keep, length), min(keep, length - stop)
        parts = [np.concatenate(part, axis=1) for part in zip(*found, strict=True)]
        return _signals(responses, parts, [slice(-len(given), None) for given in responses])

    def _select(
        self, logits_BV: Any, top_k: int, named_BK: Any = None, keep_B: Any = None
    ) -> tuple[Any, ...]:
        logits_BV = logits_BV.float()
        if named_BK is not None:
            found = read_tokens(logits_BV, named_BK)
        elif keep_B is not None:
            found = sample_top_k(logits_BV, keep_B, top_k)
        else:
            found = select_top_k(logits_BV, top_k)
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
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _signals(
    responses: Sequence[Sequence[int]], found: Sequence[Any], kept: Sequence[slice]
) -> list[Signal]:
    """Return copies of each row's ids and logits `[B, T, K]` and logsumexp `[B, T]`."""
    ids, logits, logsumexp = found
    return [
        Signal(
            response_ids=np.array(response, dtype=np.int32),
            token_ids=ids[row, at].copy(),
            logits=logits[row, at].copy(),
            logsumexp=logsumexp[row, at].copy(),
        )
        for row, (response, at) in enumerate(zip(responses, kept, strict=True))
    ]


def _length(prompt: Prompt) -> int:
    """Tokens that are read, of a given response too, whose last token only follows."""
    return len(prompt.ids) + (0 if prompt.given is None else len(prompt.given) - 1)


def _kind(prompt: Prompt) -> tuple[bool, bool]:
    """Return what the prompts of a batch have in common."""
    return prompt.given is not None, prompt.named is not None


def _keep(prompts: Sequence[Prompt], positions: int) -> Any:
    """Return what the kept tokens are drawn by, `[B, T]`, last positions last; None for none.

    A row has the same numbers whatever other rows have more positions.
    """
    if prompts[0].keep is None:
        return None
    keep_BT = torch.zeros((len(prompts), positions), dtype=torch.float64)
    for keep_T, prompt in zip(keep_BT, prompts, strict=True):
        own = positions if prompt.given is None else len(prompt.given)
        keep_T[-own:] = torch.from_numpy(uniforms(prompt.keep or 0, own))
    return keep_BT


def _named(prompts: Sequence[Prompt], positions: int, top_k: int) -> Any:
    """Return the tokens to read, `[B, T, K]`, last positions last; None where none are named."""
    if prompts[0].named is None:
        return None
    named_BTK = torch.zeros((len(prompts), positions, top_k), dtype=torch.int64)
    for named_TK, prompt in zip(named_BTK, prompts, strict=True):
        ids = np.asarray(prompt.named, dtype=np.int64)
        named_TK[-len(ids) :] = torch.from_numpy(ids)
    return named_BTK


def _device(name: str) -> Any:
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
