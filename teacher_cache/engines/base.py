"""What the builder asks of an engine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from duet_unlearn.errors import DuetError
from duet_unlearn.teacher_cache.format.signal import Signal

TokenIds = npt.NDArray[np.int32]


class Prompt(NamedTuple):
    """What an engine is asked."""

    number: int
    """Its index, by which it is known."""
    ids: Sequence[int]
    """Token ids of the prompt."""
    given: Sequence[int] | None = None
    """Those of the response to score; None decodes one."""
    named: TokenIds | None = None
    """Of a given response, the tokens to read in place of the strongest, `[T, K]`."""
    seed: int | None = None
    """Draws the response at `EngineConfig.temperature`; None decodes it greedily."""
    keep: int | None = None
    """Draws the tokens that are kept, see `sample_top_k`; None keeps the strongest."""


AnyPrompt = Prompt | tuple[int, Sequence[int]]
"""A prompt, or number and token ids of a plain one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Everything an engine needs to start."""

    model: Path
    """Local model folder."""
    top_k: int
    """Tokens kept at each position."""
    positions: int
    """Most positions a query; fewer where an end-of-sequence token comes first."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a response. The signal at the position that produced one is kept."""
    compute_dtype: str
    """`float32`, `bfloat16` or `float16`."""
    max_prompt_tokens: int
    """Length of the longest prompt: the engine reserves room for it and what it decodes."""
    temperature: float = 0.0
    """Divides the logits of the distribution that prompts with a seed draw from."""
    max_new_tokens: int = 0
    """Longest answer of `Engine.responses`; 0 where none is asked for."""
    trust_remote_code: bool = False
    """Run code that comes with the model folder. Off unless the user asked for it."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Options for the engine itself, by its own names: `tensor_parallel_size` for vLLM, say."""


class Engine(Protocol):
    """Runs the teacher over rendered prompts."""

    name: str
    """`vllm` or `transformers`."""
    continuous: bool
    """Whether prompts of one stream share batches whatever their order, so that a stream should be
    long; if not, each `signals` call makes batches of its own and nothing is lost by short ones."""

    def signals(self, prompts: Iterable[AnyPrompt]) -> Iterator[tuple[int, Signal]]:
        """Yield `(index, signal)` for every prompt, in any order.

        A response that is given is not decoded: its positions are those that predict its tokens,
        from the prompt's last token to its own last but one. Where tokens are named to be read
        there, the signal has them, in the order they are named in. A prompt with a seed draws its
        tokens as `sampling` says; its signal is of the raw logits all the same. All prompts of a
        stream keep drawn tokens, or none does.

        Reads ahead of what it yields so that the engine stays busy, and never holds more than a
        bounded number of prompts or signals. One such stream at a time; one that is dropped
        half-way leaves the engine usable.
        """

    def responses(
        self, prompts: Iterable[tuple[int, Sequence[int]]], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield `(index, token ids)` of a greedy answer to every `(index, prompt ids)`.

        In any order; an answer ends before its first end-of-sequence token, and at the latest
        after `max_new_tokens`, at most `EngineConfig.max_new_tokens`.
        """

    def describe(self) -> dict[str, Any]:
        """Name, versions and settings that may move the last bits of a logit (JSON values)."""

    def close(self) -> None:
        """Free the model and end its processes; safe to call twice."""


def check_signal(signal: Signal, prompt: Prompt, config: EngineConfig, engine: str) -> Signal:
    """Return the signal, or raise where it is not what a cache may hold.

    Args:
        signal: What an engine found.
        prompt: What it was asked. Where it gives no response, the decoded one has to be as long as
            asked for; where kept tokens are not drawn, no place is empty.
        config: How it was started.
        engine: Its name.

    Raises:
        DuetError: A value is not finite, or the response is shorter than the positions asked for
            without ending in an end-of-sequence token.
    """
    filled = np.isfinite(signal.logits) | (prompt.keep is not None)
    if not (filled.all() and np.isfinite(signal.logsumexp).all()):
        raise DuetError(
            f"{engine} engine: the teacher {config.model} gives logits that are not finite in "
            f"{config.compute_dtype}; try another --teacher-dtype, or a smaller --top-k where the "
            "model masks part of its vocabulary"
        )
    length = len(signal.response_ids)
    ended = prompt.given is not None or int(signal.response_ids[-1]) in config.eos_token_ids
    if length < config.positions and not ended:
        raise DuetError(
            f"{engine} engine: a response ended after {length} of {config.positions} positions "
            "without an end-of-sequence token; the model's context is too short for this query"
        )
    return signal


def cause(error: BaseException) -> str:
    """Return what an engine's exception says, as one line of readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."
