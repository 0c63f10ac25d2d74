"""The teacher as a build sees it: shards of prompts go in, shards of signals come out.

One engine in this process does it here; many in the processes of a Ray cluster do it in `workers`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from duet_unlearn.teacher_cache.engines.base import Engine
from duet_unlearn.teacher_cache.format.signal import Signal


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPrompts:
    """The prompts of one shard that the teacher has to answer."""

    index: int
    """Which shard."""
    prompts: dict[int, npt.NDArray[np.int32]]
    """By number in the shard, each `[P]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSignals:
    """What the teacher says to them."""

    index: int
    """Which shard."""
    signals: dict[int, Signal]
    """By number in the shard."""
    engine: dict[str, Any]
    """What computed them, see `Engine.describe`."""


Progress = Callable[[int], object]
"""Told how many more queries were answered."""


class Teacher(Protocol):
    """Answers shards of prompts."""

    def answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Yield every shard's signals, in any order, holding a bounded number of them.

        Raises:
            DuetError: An engine failed.
        """
        ...

    def close(self) -> None:
        """End the engines; safe to call twice."""
        ...


class LocalTeacher:
    """One engine, in this process or a child of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Yield every shard's signals; see `Teacher.answer`."""
        if not self._engine.continuous:
            # Batches end with their shard: no bit of a row depends on which other shards this
            # process computes.
            for shard in work:
                yield from self._answer([shard], progress)
            return
        yield from self._answer(work, progress)

    def _answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Stream prompts through the engine, and give each shard with its last signal."""
        description = self._engine.describe()
        places: list[tuple[int, int]] = []
        due: dict[int, int] = {}
        pending: dict[int, dict[int, Signal]] = {}

        def prompts() -> Iterator[tuple[int, list[int]]]:
            for shard in work:
                due[shard.index] = len(shard.prompts)
                for number, ids in shard.prompts.items():
                    places.append((shard.index, number))
                    yield len(places) - 1, ids.tolist()

        for prompt, signal in self._engine.signals(prompts()):
            index, number = places[prompt]
            pending.setdefault(index, {})[number] = signal
            progress(1)
            if len(pending[index]) == due[index]:
                yield ShardSignals(index=index, signals=pending.pop(index), engine=description)

    def close(self) -> None:
        """End the engine."""
        self._engine.close()
