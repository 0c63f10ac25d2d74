"""The teacher as a build sees it: shards of prompts go in, shards of signals come out.

One engine in this process does it here; many in the processes of a Ray cluster do it in `workers`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from duet_unlearn.teacher_cache.engines.base import Engine, Prompt
from duet_unlearn.teacher_cache.format.signal import Signal

Prompts = Sequence[tuple[int, Sequence[int]]]
"""Token ids of a few prompts, each with its index."""
Progress = Callable[[int], object]
"""Called with the number of queries that were answered since the last call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPrompts:
    """The prompts of one shard that the teacher has to answer."""

    index: int
    """Which shard."""
    prompts: dict[int, npt.NDArray[np.int32]]
    """By number in the shard, each `[P]`."""
    given: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    """Responses to score in place of decoding some, `[T]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSignals:
    """What the teacher says to them."""

    index: int
    """Which shard."""
    signals: dict[int, Signal]
    """By number in the shard."""
    engine: dict[str, Any]
    """What computed them, see `Engine.describe`."""


class Teacher(Protocol):
    """Answers shards of prompts."""

    def answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Yield every shard's signals, in any order, holding a bounded number of them.

        Raises:
            DuetError: An engine failed.
        """
        ...

    def responses(self, prompts: Prompts, max_new_tokens: int) -> Iterable[tuple[int, list[int]]]:
        """Return greedy answers to a few prompts; see `Engine.responses`."""
        ...

    def close(self) -> None:
        """End the engines; safe to call twice."""
        ...


class LocalTeacher:
    """One engine, in this process or a child of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.responses = engine.responses
        self.close = engine.close

    def answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Yield every shard's signals; see `Teacher.answer`."""
        if self._engine.continuous:
            yield from self._answer(work, progress)
            return
        # Batches end with their shard: no bit of a row depends on which other shards this process
        # computes.
        for shard in work:
            yield from self._answer([shard], progress)

    def _answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Stream prompts through the engine, and give each shard with its last signal."""
        description = self._engine.describe()
        places: list[tuple[ShardPrompts, int]] = []
        pending: dict[int, dict[int, Signal]] = {}

        def prompts() -> Iterator[Prompt]:
            for shard in work:
                for number, ids in shard.prompts.items():
                    places.append((shard, number))
                    given = [shard.given[number].tolist()] if number in shard.given else []
                    yield len(places) - 1, ids.tolist(), *given

        for prompt, signal in self._engine.signals(prompts()):
            shard, number = places[prompt]
            signals = pending.setdefault(shard.index, {})
            signals[number] = signal
            progress(1)
            if len(signals) == len(shard.prompts):
                del pending[shard.index]
                yield ShardSignals(index=shard.index, signals=signals, engine=description)
