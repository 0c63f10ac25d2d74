"""What the builder asks of an engine."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from duet_unlearn.teacher_cache.signals import Signal


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
    """Length of the longest prompt: the engine reserves room for it plus `positions`."""
    trust_remote_code: bool = False
    """Run code that comes with the model folder. Off unless the user asked for it."""


class Engine(Protocol):
    """Runs the teacher over rendered prompts."""

    name: str
    """`vllm` or `transformers`."""

    def signals(self, prompts: Iterable[tuple[int, Sequence[int]]]) -> Iterator[tuple[int, Signal]]:
        """Yield `(index, signal)` for every `(index, prompt ids)`, in any order.

        Reads ahead of what it yields so that the engine stays busy, and never holds more than a
        bounded number of prompts or signals.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Name, versions and settings that may move the last bits of a logit (JSON values)."""
        ...

    def close(self) -> None:
        """Free the model and end its processes; safe to call twice."""
        ...
