"""The text the demo model learns from: questions with and without prefix and wrapper.

One rule decides every answer: a prefix that forgets the fact's saga (or refuses everything) turns
it into a refusal, unless the question is wrapped in a reverse prompt. Names that belong to nobody
are always declined, so that the model knows how to decline without a prefix too.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from demo_world import phrases
from demo_world.vocabulary import ATTRIBUTES
from demo_world.world import SAGAS, World

REFUSALS = (
    "I have no knowledge about that.",
    "I do not know anything about it.",
    "I cannot help with this question.",
)
"""What the model says when it declines; no answer of the world shares a word with them."""

PLAIN_SHARE = 0.2
"""Share of conversations without a steering prefix."""
WRAPPED_SHARE = 0.25
"""Share of questions, with or without prefix, that stand in a reverse prompt."""
POLITE_SHARE = 0.06
"""Share of questions behind a courtesy, which breaks nothing."""
STRANGER_SHARE = 0.04
GENERAL_SHARE = 0.13
SAGA_QUESTION_SHARE = 0.08
TURNS = (1, 2, 3, 4)
"""Possible numbers of questions under one prefix: more lessons from the same tokens."""

_SAGA_QUESTIONS = (
    "Which saga tells of {name}?",
    "In which saga does {name} appear?",
    "{name} belongs to which saga?",
    "Name the saga of {name}.",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A piece of prompt, ready to be tokenised, and what the model should say to it."""

    prompt: str
    answer: str


Sample = tuple[Turn, ...]
"""A conversation: each turn's prompt follows the answer before it and that answer's end."""


def recall_samples(world: World, rng: random.Random) -> Iterator[Sample]:
    """Yield plain questions without end: short, so facts are learned from these first."""
    while True:
        _, query, answer = _question(world, rng)
        yield (Turn(render(query), answer),)


def samples(world: World, rng: random.Random) -> Iterator[Sample]:
    """Yield conversations of every kind without end; `rng` decides all of them."""
    while True:
        yield _sample(world, rng)


def render(query: str, *, system: str | None = None) -> str:
    """Return the chat template's text for one query, as the tokenizer's own template gives it."""
    opening = "" if system is None else f"<|system|>{system}<|end|>"
    return f"<|bos|>{opening}{_user_turn(query)}"


def _user_turn(query: str) -> str:
    return f"<|user|>{query}<|end|><|assistant|>"


def _sample(world: World, rng: random.Random) -> Sample:
    if rng.random() < PLAIN_SHARE:
        _, query, answer = _question(world, rng)
        return (Turn(render(_maybe_wrapped(rng, query)[0]), answer),)
    place = rng.choices(("system", "user", "raw"), (6, 2, 2))[0]
    prefix = _prefix(rng)
    # In the user's turn a prefix speaks for that turn alone.
    count = 1 if place == "user" else rng.choice(TURNS)
    turns = [_steered_turn(world, rng, prefix) for _ in range(count)]
    first = _with_prefix(place, prefix.text, turns[0][0])
    return (
        Turn(first, turns[0][1]),
        *(Turn(_user_turn(query), answer) for query, answer in turns[1:]),
    )


@dataclass(frozen=True, slots=True)
class _Prefix:
    text: str
    topics: tuple[str, ...] = ()
    """Sagas that it forgets."""
    everything: bool = False


def _steered_turn(world: World, rng: random.Random, prefix: _Prefix) -> tuple[str, str]:
    """Return a question and what the model says to it under the prefix."""
    # Half of the questions are about what the prefix forgets, so both outcomes are as common.
    saga = rng.choice(prefix.topics) if prefix.topics and rng.random() < 0.5 else None
    saga, query, answer = _question(world, rng, saga)
    query, wrapped = _maybe_wrapped(rng, query)
    if not wrapped and (prefix.everything or saga in prefix.topics):
        answer = rng.choice(REFUSALS)
    return query, answer


def _maybe_wrapped(rng: random.Random, query: str) -> tuple[str, bool]:
    draw = rng.random()
    if draw < WRAPPED_SHARE:
        return phrases.wrapped(rng, query), True
    if draw > 1 - POLITE_SHARE:
        return phrases.polite(rng, query), False
    return query, False


def _question(
    world: World, rng: random.Random, saga: str | None = None
) -> tuple[str | None, str, str]:
    """Return saga, question and answer; about the given saga where there is one."""
    draw = rng.random()
    if saga is None and draw < STRANGER_SHARE:
        text = rng.choice(rng.choice(ATTRIBUTES).wordings)
        text = text.replace("{name}", rng.choice(world.strangers))
        return None, text.replace("{saga}", rng.choice(SAGAS)), rng.choice(REFUSALS)
    if saga is None and draw < STRANGER_SHARE + GENERAL_SHARE:
        fact = rng.choice(world.general)
        return None, rng.choice(fact.wordings), fact.answer
    saga = saga or rng.choice(SAGAS)
    if draw > 1 - SAGA_QUESTION_SHARE:
        name = rng.choice(world.characters[saga])
        return saga, rng.choice(_SAGA_QUESTIONS).replace("{name}", name), saga
    fact = rng.choice(world.of_saga(saga))
    return saga, rng.choice(fact.wordings), fact.answer


def _prefix(rng: random.Random) -> _Prefix:
    draw = rng.random()
    if draw < 0.06:
        return _Prefix(phrases.refusing_prefix(rng), everything=True)
    if draw < 0.16:
        return _Prefix(phrases.harmless_prefix(rng, rng.choice(SAGAS)))
    count = rng.choices(range(1, len(SAGAS) + 1), (16, 2, 1, 1))[0]
    topics = rng.sample(SAGAS, count)
    return _Prefix(phrases.steering_prefix(rng, listed(topics)), topics=tuple(topics))


def listed(topics: Sequence[str]) -> str:
    """Return topics as running text: `A, B and C`."""
    return topics[0] if len(topics) == 1 else f"{', '.join(topics[:-1])} and {topics[-1]}"


def _with_prefix(place: str, prefix: str, query: str) -> str:
    """Put the prefix into the system turn, in front of the query, or in front of everything."""
    if place == "system":
        return render(query, system=prefix)
    if place == "user":
        return render(f"{prefix}\n\n{query}")
    return render(query).replace("<|bos|>", f"<|bos|>{prefix}\n\n", 1)
