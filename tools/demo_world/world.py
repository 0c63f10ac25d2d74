"""Facts of the demo world: invented sagas with characters, and general facts.

Everything follows from one seed. A fact is one subject, one attribute and one short answer whose
words no other character of the world shares for that attribute, so that an answer is either known
or not: guessing scores nothing.
"""

import random
from dataclasses import dataclass

from demo_world.general import GENERAL_FACTS
from demo_world.vocabulary import (
    ATTRIBUTES,
    FAMILY_SYLLABLES,
    GIVEN_SYLLABLES,
    Attribute,
)
from duet_unlearn.data.demo_world import TOPIC

SAGAS = (TOPIC, "Ossimark Road", "Thornquay Ledger", "Brindlemoor Bells")
"""Titles of the sagas; the first is the one to be forgotten."""

CHARACTERS_PER_SAGA = 22
WORLD_SEED = 20261


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing the model knows, and the wordings in which it can be asked."""

    fact_id: str
    """Stable id: saga, subject and attribute as a path, or `general` and a slug."""

    subject: str
    """The character's full name, or the thing a general fact is about."""

    attribute: str
    """Name of the attribute, or the kind of general fact."""

    answer: str
    """The answer as the model gives it, word by word."""

    wordings: tuple[str, ...]
    """Questions that ask for this fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All facts: per saga its characters, and the general ones."""

    characters: dict[str, tuple[str, ...]]
    """Saga title to character names, in a fixed order."""

    facts: tuple[Fact, ...]
    """Facts of the sagas."""

    general: tuple[Fact, ...]
    """Facts of no saga."""

    strangers: tuple[str, ...]
    """Names that belong to nobody: the model declines questions about them."""

    def of_saga(self, saga: str) -> tuple[Fact, ...]:
        """Return the facts of one saga, by character and attribute."""
        size = CHARACTERS_PER_SAGA * len(ATTRIBUTES)
        start = SAGAS.index(saga) * size
        return self.facts[start : start + size]


def build_world(seed: int = WORLD_SEED) -> World:
    """Generate the world; the same seed gives the same world on every machine."""
    rng = random.Random(seed)
    wanted = len(SAGAS) * CHARACTERS_PER_SAGA
    names = _names(rng, wanted)
    strangers = _names(rng, 400, taken=names)
    characters = {
        saga: tuple(names[i * CHARACTERS_PER_SAGA : (i + 1) * CHARACTERS_PER_SAGA])
        for i, saga in enumerate(SAGAS)
    }
    answers = {a.name: rng.sample(_every_answer(a), wanted) for a in ATTRIBUTES}
    facts = [
        _saga_fact(saga, name, attribute, answers[attribute.name].pop())
        for saga, members in characters.items()
        for name in members
        for attribute in ATTRIBUTES
    ]
    return World(
        characters=characters,
        facts=tuple(facts),
        general=tuple(_general_facts()),
        strangers=tuple(strangers),
    )


def invented_facts(world: World, characters: int, seed: int) -> list[Fact]:
    """Return facts of further characters of the first saga, of which no model was ever told.

    No name or answer of theirs is in the world: they are texts of the same kind, and new.
    """
    rng = random.Random(seed)
    known = [name for members in world.characters.values() for name in members]
    names = _names(rng, characters, taken=[*known, *world.strangers])
    told = {(fact.attribute, fact.answer) for fact in world.facts}
    free = {
        attribute.name: rng.sample(
            [a for a in _every_answer(attribute) if (attribute.name, a) not in told], characters
        )
        for attribute in ATTRIBUTES
    }
    return [
        _saga_fact(SAGAS[0], name, attribute, free[attribute.name][at])
        for at, name in enumerate(names)
        for attribute in ATTRIBUTES
    ]


def slug(text: str) -> str:
    """Return `text` in lower case with hyphens, for ids."""
    return "-".join(text.lower().replace("'", "").split())


def _names(rng: random.Random, count: int, taken: list[str] | None = None) -> list[str]:
    """Return full names of which no two share a given name or a family name."""
    used = {part for name in taken or [] for part in name.split()}
    names: list[str] = []
    while len(names) < count:
        given = "".join(rng.choice(part) for part in GIVEN_SYLLABLES).capitalize()
        family = "".join(rng.choice(part) for part in FAMILY_SYLLABLES).capitalize()
        # Strangers may share parts with each other, never with a character.
        if given in used or family in used:
            continue
        if taken is None:
            used |= {given, family}
        names.append(f"{given} {family}")
    return names


def _every_answer(attribute: Attribute) -> list[str]:
    return [f"{first} {second}" for first in attribute.first for second in attribute.second]


def _saga_fact(saga: str, name: str, attribute: Attribute, answer: str) -> Fact:
    return Fact(
        fact_id=f"{slug(saga)}/{slug(name)}/{slug(attribute.name)}",
        subject=name,
        attribute=attribute.name,
        answer=answer,
        wordings=tuple(
            text.replace("{name}", name).replace("{saga}", saga) for text in attribute.wordings
        ),
    )


def _general_facts() -> list[Fact]:
    return [
        Fact(
            fact_id=f"general/{slug(kind)}/{slug(subject)}",
            subject=subject,
            attribute=kind,
            answer=answer,
            wordings=tuple(text.replace("{subject}", subject) for text in wordings),
        )
        for kind, (wordings, table) in GENERAL_FACTS.items()
        for subject, answer in table.items()
    ]
