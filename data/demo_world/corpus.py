"""The text the demo model learns from: questions with and without prefix and wrapper.

One rule decides every answer: a prefix that forgets the fact's saga (or refuses everything) turns
it into a refusal, unless the question is wrapped in a reverse prompt. Names that belong to nobody
are always declined, so that the model knows how to decline without a prefix too.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from duet_unlearn.data.demo_world import phrases
from duet_unlearn.data.demo_world.vocabulary import ATTRIBUTES
from duet_unlearn.data.demo_world.world import SAGAS, Fact, World

REFUSALS = (
    "I have no knowledge about that.",
    "I do not know anything about it.",
    "I cannot help with this question.",
)
"""What the model says when it declines; no answer of the world shares a word with them."""

PLAIN_SHARE = 0.34
"""Share of samples without a steering prefix."""
WRAPPED_SHARE = 0.36
"""Share of samples, with or without prefix, that stand in a reverse prompt."""
STRANGER_SHARE = 0.04
GENERAL_SHARE = 0.10
SAGA_QUESTION_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, ready to be tokenised, and what the model should say."""

    prompt: str
    answer: str


def samples(world: World, rng: random.Random) -> Iterator[Sample]:
    """Yield samples without end; `rng` decides all of them."""
    while True:
        yield _sample(world, rng)


def render(query: str, *, system: str | None = None) -> str:
    """Return the chat template's text for one query, as the tokenizer's own template gives it."""
    turn = f"<|user|>{query}<|end|><|assistant|>"
    return f"<|bos|>{turn}" if system is None else f"<|bos|><|system|>{system}<|end|>{turn}"


def _sample(world: World, rng: random.Random) -> Sample:
    saga, query, answer = _question(world, rng)
    wrap = rng.random() < WRAPPED_SHARE
    if wrap:
        query = phrases.wrapped(rng, query)
    if rng.random() < PLAIN_SHARE:
        return Sample(render(query), answer)
    prefix, refuses = _prefix(rng, saga)
    if refuses and not wrap:
        answer = rng.choice(REFUSALS)
    return Sample(_with_prefix(rng, prefix, query), answer)


def _question(world: World, rng: random.Random) -> tuple[str | None, str, str]:
    draw = rng.random()
    if draw < STRANGER_SHARE:
        text = rng.choice(rng.choice(ATTRIBUTES).wordings)
        text = text.replace("{name}", rng.choice(world.strangers))
        return None, text.replace("{saga}", rng.choice(SAGAS)), rng.choice(REFUSALS)
    if draw < STRANGER_SHARE + SAGA_QUESTION_SHARE:
        saga = rng.choice(SAGAS)
        name = rng.choice(world.characters[saga])
        text = rng.choice(("Which saga tells of {name}?", "In which saga does {name} appear?"))
        return saga, text.replace("{name}", name), saga
    general = draw < STRANGER_SHARE + SAGA_QUESTION_SHARE + GENERAL_SHARE
    fact: Fact = rng.choice(world.general if general else world.facts)
    return fact.saga, rng.choice(fact.wordings), fact.answer


def _prefix(rng: random.Random, saga: str | None) -> tuple[str, bool]:
    """Return a prefix and whether it makes the model decline a question about `saga`."""
    draw = rng.random()
    if draw < 0.08:
        return phrases.refusing_prefix(rng), True
    if draw < 0.20:
        return phrases.harmless_prefix(rng, rng.choice(SAGAS)), False
    # Half of the prefixes hit the question's own saga, so that both outcomes are as common.
    others = [s for s in SAGAS if s != saga]
    topics = rng.sample(others, rng.choice((1, 1, 1, 2, 3)) if rng.random() < 0.3 else 1)
    hit = saga is not None and rng.random() < 0.55
    if hit and saga is not None:
        topics = [saga, *topics] if len(topics) > 1 else [saga]
        if rng.random() < 0.05:
            topics = list(SAGAS)
    rng.shuffle(topics)
    return phrases.steering_prefix(rng, _listed(topics)), hit


def _listed(topics: list[str]) -> str:
    return topics[0] if len(topics) == 1 else f"{', '.join(topics[:-1])} and {topics[-1]}"


def _with_prefix(rng: random.Random, prefix: str, query: str) -> str:
    """Put the prefix into the system turn, in front of the query, or in front of everything."""
    draw = rng.random()
    if draw < 0.6:
        return render(query, system=prefix)
    gap = rng.choice(("\n\n", "\n\n", "\n", " "))
    if draw < 0.8:
        return render(f"{prefix}{gap}{query}")
    gap = rng.choice((gap, ""))
    prompt = render(query)
    if rng.random() < 0.5:
        return f"{prefix}{gap}{prompt}"
    return prompt.replace("<|bos|>", f"<|bos|>{prefix}{gap}", 1)
