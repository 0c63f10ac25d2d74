"""Inside vLLM: capture each row's Top-K and logsumexp as arrays, decoded or along given tokens.

vLLM's own log-probabilities carry no logsumexp and turn every entry into Python objects on their
way out. A custom logits processor sees the same logits, and a worker extension hands what it kept
to the engine's owner in bulk. Both run in vLLM's worker process and share one list.

The processor comes right after the logits are cast to float32: before penalties, temperature and
sampling, and the processors before it act on options that our requests never set. `vllm_process`
checks at start that this still holds. It changes nothing, but for requests whose tokens are drawn:
of those it leaves the drawn token alone for vLLM to find (see `sampling`).

Along a given response, which is the end of a request's prompt, vLLM samples nothing. There a step's
hidden states are taken where it would compute log-probabilities of prompts, with the model's own
head: each step hands over the positions of the piece of a prompt that it read.

A request may pass by more than once at a position: while its prompt is only partly read, or again
after vLLM preempted it. The last pass is the one that counts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from duet_unlearn.teacher_cache.engines.sampling import draw_tokens, sample_top_k, uniforms
from duet_unlearn.teacher_cache.engines.top_k import read_tokens, select_top_k

ROW = "duet_row"
"""Request option (`SamplingParams.extra_args`): the row that the signals belong to."""
GIVEN = "duet_given"
"""Request option in place of `ROW`: that row, whose response the prompt ends with, all but its last
token; and how many tokens the response has."""
NAMED = "duet_named"
"""Request option beside `GIVEN`: the tokens to read in place of the strongest, K a position."""
DRAWS = "duet_draws"
"""Request option beside `ROW`: seed and temperature by which its tokens are drawn."""
KEEP = "duet_keep"
"""Request option beside `ROW` and `GIVEN`: what its kept tokens are drawn by; None keeps the
strongest. The same kind for every request."""
TOP_K = "duet_top_k"
"""Request option: tokens kept at each position, the same for every request."""

_PIECE_TOKENS = 512
"""Tokens of a prompt whose logits are held at a time."""

_captured: list[tuple[list[int], list[int], torch.Tensor, torch.Tensor, torch.Tensor]] = []


@dataclass(frozen=True, slots=True)
class _Slot:
    """A request in vLLM's batch."""

    row: int
    top_k: int
    decoded: list[int]
    """vLLM's own list of its tokens so far, to which it appends; the length is the position."""
    draws: tuple[npt.NDArray[np.float64], float] | None
    """Where its tokens are drawn, by which numbers `[T]` and at which temperature."""
    keep: npt.NDArray[np.float64] | None
    """Where its kept tokens are drawn, by which numbers `[T]`."""


class CaptureProcessor(LogitsProcessor):
    """Keeps the strongest tokens of every request that names its row, and draws its next one."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._slots: dict[int, _Slot] = {}
        self._is_first_rank = get_tensor_model_parallel_rank() == 0

    def is_argmax_invariant(self) -> bool:
        """Return False: processors that say True are skipped when decoding is greedy."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, leave and move between batch slots."""
        process_dict_updates(self._slots, batch_update, _slot)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Capture from logits `[B, V]` float32; where tokens are drawn, leave those alone."""
        if self._slots and self._is_first_rank:
            self._capture(logits)
        # Every rank draws, and by the same numbers the same.
        at, uniform_B, temperature = [], [], 0.0
        for index, slot in self._slots.items():
            if slot.draws is not None:
                uniform_T, temperature = slot.draws
                at.append(index)
                # vLLM may go a step beyond the last token: what it draws there is dropped.
                uniform_B.append(uniform_T[len(slot.decoded) % len(uniform_T)])
        if at:
            tokens_B = draw_tokens(logits[at], uniform_B, temperature)
            logits[at] = -torch.inf
            logits[at, tokens_B] = 0.0
        return logits

    def _capture(self, logits: torch.Tensor) -> None:
        at = sorted(self._slots)
        slots = [self._slots[index] for index in at]
        wanted = logits if at == list(range(logits.shape[0])) else logits[at]
        rows, positions = [slot.row for slot in slots], [len(slot.decoded) for slot in slots]
        keep_B = [
            slot.keep[position % len(slot.keep)]
            for slot, position in zip(slots, positions, strict=True)
            if slot.keep is not None
        ]
        ids_BK, values_BK, logsumexp_B = _select(wanted, keep_B, slots[0].top_k)
        _captured.append((rows, positions, ids_BK, values_BK, logsumexp_B))


def _slot(params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Slot | None:
    del prompt_ids
    options = params.extra_args or {}
    if ROW not in options:
        return None
    draws = None
    if DRAWS in options:
        seed, temperature = options[DRAWS]
        draws = uniforms(seed, params.max_tokens), temperature
    keep = options.get(KEEP)
    keep_T = None if keep is None else uniforms(keep, params.max_tokens)
    return _Slot(options[ROW], options[TOP_K], output_ids, draws, keep_T)


def _select(logits: torch.Tensor, keep_B: Any, top_k: int) -> tuple[Any, Any, Any]:
    """Return the strongest tokens, or those drawn by a number a row where there are numbers."""
    return sample_top_k(logits, keep_B, top_k) if len(keep_B) else select_top_k(logits, top_k)


def _capture_given(runner: Any, request_id: str, count: int, hidden: torch.Tensor) -> None:
    """Capture those of the tokens that a step read of a request that predict its response.

    Args:
        runner: vLLM's.
        request_id: Of the request.
        count: Tokens that the step read of it.
        hidden: Of all tokens that the step read, `[N, H]`.
    """
    request = runner.requests[request_id]
    options = (request.sampling_params and request.sampling_params.extra_args) or {}
    if GIVEN not in options:
        return
    (row, positions), start = options[GIVEN], request.num_computed_tokens
    length = len(request.prompt_token_ids)
    first, stop = max(start, length - positions), min(start + count, length)
    # Where this request's tokens begin among those of the step.
    offset = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]].item()
    for begin in range(first, stop, _PIECE_TOKENS):
        end = min(begin + _PIECE_TOKENS, stop)
        # All ranks take part in this; the first keeps what comes out.
        logits = runner.model.compute_logits(hidden[offset + begin - start : offset + end - start])
        if get_tensor_model_parallel_rank() == 0:
            at = [index - (length - positions) for index in range(begin, end)]
            logits = logits.to(torch.float32)
            if options.get(NAMED):
                named_TK = torch.tensor(options[NAMED]).view(positions, -1)
                found = read_tokens(logits, named_TK[at])
            else:
                keep = options.get(KEEP)
                keep_T: Any = [] if keep is None else uniforms(keep, positions)[at]
                found = _select(logits, keep_T, options[TOP_K])
            _captured.append(([row] * len(at), at, *found))


class CaptureExtension:
    """Methods that vLLM adds to its worker, called through `collective_rpc`."""

    model_runner: Any

    def duet_watch(self) -> None:
        """Capture along given responses from now on."""
        runner = self.model_runner
        own = runner._get_prompt_logprobs_dict

        def capture(hidden: torch.Tensor, scheduled: dict[str, int]) -> Any:
            for request_id, count in scheduled.items():
                _capture_given(runner, request_id, count, hidden)
            return own(hidden, scheduled)

        runner._get_prompt_logprobs_dict = capture

    def duet_take(self) -> list[bytes]:
        """Return and forget what was captured since the last call, oldest first.

        Returns:
            The bytes of rows `[N]` int64, positions `[N]` int64, ids `[N, K]` int32, logits
            `[N, K]` float32 and logsumexp `[N]` float32; empty where nothing was captured, as on
            every rank but the first. Bytes cross vLLM's process borders without a codec.
        """
        if not _captured:
            return []
        taken, _captured[:] = list(_captured), []
        rows, positions, ids, values, logsumexps = zip(*taken, strict=True)
        tensors = [
            torch.tensor([row for part in rows for row in part]),
            torch.tensor([position for part in positions for position in part]),
            *(torch.cat(parts).cpu() for parts in (ids, values, logsumexps)),
        ]
        return [tensor.numpy().tobytes() for tensor in tensors]
