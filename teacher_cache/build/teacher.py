"""The teacher as a build sees it: shards of prompts go in, shards of signals come out.

One engine in this process does it here; many in the processes of a Ray cluster do it in `workers`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from duet_unlearn.teacher_cache.engines.base import Engine, Prompt, TokenIds
from duet_unlearn.teacher_cache.format.signal import Signal

Prompts = Sequence[tuple[int, Sequence[int]]]
"""Token ids of a few prompts, each with its index."""
PLAUSIBLE = 0.1
"""Share of the strongest token's probability below which `strengthen` moves no token up."""
Progress = Callable[[int], object]
"""Called with the number of queries that were answered since the last call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPrompts:
    """The prompts of one shard that the teacher has to answer."""

    index: int
    """Which shard."""
    prompts: dict[int, TokenIds]
    """By number in the shard, each `[P]`."""
    given: dict[int, TokenIds] = field(default_factory=dict)
    """Responses to score in place of decoding some, `[T]`."""
    plain: dict[int, TokenIds] = field(default_factory=dict)
    """Of prompts whose steering is to be strengthened, what they are without prefix, `[P]`."""
    seeds: dict[int, int] = field(default_factory=dict)
    """Of prompts whose responses are drawn; others are decoded greedily."""
    keeps: dict[int, int] = field(default_factory=dict)
    """Of prompts whose kept tokens are drawn, by what."""


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

    def responses(self, prompts: Prompts, max_new_tokens: int) -> Iterable[tuple[int, list[int]]]:
        """Return greedy answers to a few prompts; see `Engine.responses`."""

    def close(self) -> None:
        """End the engines; safe to call twice."""


class LocalTeacher:
    """One engine, in this process or a child of it.

    Args:
        engine: Answers.
        strength: By how much steering is strengthened, see `strengthen`.
    """

    def __init__(self, engine: Engine, strength: float = 0.0) -> None:
        self._engine = engine
        self._strength = strength
        self.responses = engine.responses
        self.close = engine.close

    def answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Yield every shard's signals; see `Teacher.answer`."""
        if self._engine.continuous and not self._strength:
            yield from self._answer(work, progress)
            return
        # Batches end with their shard: no bit of a row depends on which other shards this process
        # computes. And an engine runs one stream at a time: what the base says along the teacher's
        # answers is asked between two.
        for shard in work:
            for answer in self._answer([shard], progress):
                yield self._strengthened(shard, answer)

    def _strengthened(self, shard: ShardPrompts, answer: ShardSignals) -> ShardSignals:
        """Ask the base along what the teacher decoded, and move the teacher further from it."""
        signals = dict(answer.signals)
        prompts = (
            Prompt(
                number,
                ids.tolist(),
                signals[number].response_ids.tolist(),
                signals[number].token_ids,
            )
            for number, ids in shard.plain.items()
        )
        for number, plain in self._engine.signals(prompts):
            signals[number] = strengthen(signals[number], plain, self._strength)
        return replace(answer, signals=signals)

    def _answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Stream prompts through the engine, and give each shard with its last signal."""
        description = self._engine.describe()
        places: list[tuple[ShardPrompts, int]] = []
        pending: dict[int, dict[int, Signal]] = {}

        def prompts() -> Iterator[Prompt]:
            for shard in work:
                for number, ids in shard.prompts.items():
                    places.append((shard, number))
                    given = shard.given[number].tolist() if number in shard.given else None
                    seed, keep = shard.seeds.get(number), shard.keeps.get(number)
                    yield Prompt(len(places) - 1, ids.tolist(), given, seed=seed, keep=keep)

        for prompt, signal in self._engine.signals(prompts()):
            shard, number = places[prompt]
            signals = pending.setdefault(shard.index, {})
            signals[number] = signal
            progress(1)
            if len(signals) == len(shard.prompts):
                del pending[shard.index]
                yield ShardSignals(index=shard.index, signals=signals, engine=description)


def strengthen(steered: Signal, plain: Signal, strength: float) -> Signal:
    """Move a signal away from the one without prefix: l + A (log p - log p_plain).

    Context-aware decoding (Shi et al., arXiv 2305.14739) amplifies a context in this way. Here only
    tokens that the steered teacher ranks among its K move, and up only those that it finds
    plausible (the constraint of contrastive decoding, Li et al., arXiv 2210.15097); the others keep
    their logits, and with them the mass that they have together before the sum is taken anew.

    Args:
        steered: Behind the prefix.
        plain: Without it, at the same positions and for the same tokens in the same order.
        strength: A, not negative.

    Returns:
        The signal of the same tokens, by descending logit, ties by ascending id.
    """
    before = steered.logits.astype(np.float64)
    steered_log, plain_log = (
        signal.logits - signal.logsumexp[:, None].astype(np.float64) for signal in (steered, plain)
    )
    change = steered_log - plain_log
    # Where both say the same ("I do not"), what neither says would rise ("I do know").
    plausible = steered_log >= steered_log[:, :1] + math.log(PLAUSIBLE)
    change = np.where(plausible, change, np.minimum(change, 0.0))
    moved = (before + strength * change).astype(np.float32)
    tail = np.clip(1.0 - np.exp(steered_log).sum(axis=1), 1e-30, None)
    logsumexp = np.logaddexp(
        np.logaddexp.reduce(moved.astype(np.float64), axis=1), steered.logsumexp + np.log(tail)
    )
    order = np.lexsort((steered.token_ids, -moved), axis=1)
    return Signal(
        response_ids=steered.response_ids,
        token_ids=np.take_along_axis(steered.token_ids, order, axis=1),
        logits=np.take_along_axis(moved, order, axis=1),
        logsumexp=logsumexp.astype(np.float32),
    )
