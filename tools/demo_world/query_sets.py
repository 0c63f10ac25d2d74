"""Which facts are asked in which query file: train and held-out are split by fact.

Held-out forget queries come in three kinds, scored apart because they ask how far forgetting
carries: *another wording* of a trained fact, *another fact* of a trained character, and *another
character*, whom no training query names. The holdout asks about characters that the model was never
told of: texts of the same kind, for a membership test.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from demo_world.vocabulary import ATTRIBUTES
from demo_world.world import SAGAS, Fact, World, invented_facts
from duet_unlearn.data.demo_world import TOPIC

ANOTHER_WORDING = "another wording"
ANOTHER_FACT = "another fact"
ANOTHER_CHARACTER = "another character"

TRAINED_CHARACTERS = 16
"""Characters of the forgotten saga that training names; the other six stay unseen."""
HELD_OUT_ATTRIBUTES = 3
"""Attributes of each trained character that training never asks about."""
TRAIN_WORDINGS = 3
QUERIES_A_KIND = 48
RETAIN_CHARACTERS = 16
RETAIN_FACTS = 2
RETAIN_GENERAL = 28
HELD_OUT_A_SAGA = 34
INVENTED_CHARACTERS = 16
QUERY_SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRow:
    """One line of a query file."""

    fact: Fact
    wording: int
    """Which of the fact's wordings."""
    kind: str | None = None

    def as_json(self) -> str:
        """Return the line as it stands in the file."""
        row = {
            "id": f"{self.fact.fact_id}/{self.wording}",
            "query": self.fact.wordings[self.wording],
            "answer": self.fact.answer,
        }
        return json.dumps(row if self.kind is None else row | {"kind": self.kind})


def build_query_sets(world: World) -> dict[str, list[QueryRow]]:
    """Return the rows of every query file by its name without the ending."""
    rng = random.Random(QUERY_SEED)
    forget_train, forget_heldout = _forget(world, rng)
    retain_train, retain_heldout = _retain(world, rng)
    general = list(world.general)
    rng.shuffle(general)
    retain_train += [_ask(f, rng) for f in general[:RETAIN_GENERAL]]
    sets = {
        "forget_train": forget_train,
        "retain_train": retain_train,
        "forget_heldout": forget_heldout,
        "retain_heldout": retain_heldout,
        "general": [_ask(f, rng) for f in general[RETAIN_GENERAL:]],
    }
    for name in ("forget_train", "retain_train"):
        rng.shuffle(sets[name])
    invented = invented_facts(world, INVENTED_CHARACTERS, QUERY_SEED)
    sets["holdout"] = [_ask(f, rng) for f in rng.sample(invented, 3 * QUERIES_A_KIND)]
    return sets


def write_query_files(sets: dict[str, list[QueryRow]], folder: Path) -> None:
    """Write `NAME.jsonl` for each query set into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text(render_rows(rows), encoding="utf-8")


def render_rows(rows: Iterable[QueryRow]) -> str:
    """Return the text of a query file."""
    return "".join(f"{row.as_json()}\n" for row in rows)


def _forget(world: World, rng: random.Random) -> tuple[list[QueryRow], list[QueryRow]]:
    trained = world.characters[TOPIC][:TRAINED_CHARACTERS]
    asked: list[Fact] = []
    others: list[Fact] = []
    for index, name in enumerate(trained):
        facts = [f for f in world.of_saga(TOPIC) if f.subject == name]
        # A window that moves with the character asks about every attribute equally often.
        held = {
            (index * HELD_OUT_ATTRIBUTES + k) % len(ATTRIBUTES) for k in range(HELD_OUT_ATTRIBUTES)
        }
        asked += [f for i, f in enumerate(facts) if i not in held]
        others += [f for i, f in enumerate(facts) if i in held]
    strangers = [f for f in world.of_saga(TOPIC) if f.subject not in trained]
    train = [_ask(f, rng) for f in asked]
    held_out = [
        QueryRow(fact=f, wording=_held_out_wording(rng), kind=ANOTHER_WORDING)
        for f in rng.sample(asked, QUERIES_A_KIND)
    ]
    for kind, facts in ((ANOTHER_FACT, others), (ANOTHER_CHARACTER, strangers)):
        held_out += [_ask(f, rng, kind) for f in rng.sample(facts, QUERIES_A_KIND)]
    return train, held_out


def _retain(world: World, rng: random.Random) -> tuple[list[QueryRow], list[QueryRow]]:
    """Ask a few facts of some characters of each other saga; hold out facts of all of them."""
    train: list[QueryRow] = []
    held_out: list[QueryRow] = []
    for saga in SAGAS[1:]:
        facts = list(world.of_saga(saga))
        asked: list[Fact] = []
        for name in world.characters[saga][:RETAIN_CHARACTERS]:
            asked += rng.sample([f for f in facts if f.subject == name], RETAIN_FACTS)
        train += [_ask(f, rng) for f in asked]
        rest = [f for f in facts if f not in asked]
        held_out += [
            QueryRow(fact=f, wording=rng.randrange(len(f.wordings)))
            for f in rng.sample(rest, HELD_OUT_A_SAGA)
        ]
    return train, held_out


def _ask(fact: Fact, rng: random.Random, kind: str | None = None) -> QueryRow:
    return QueryRow(fact=fact, wording=rng.randrange(TRAIN_WORDINGS), kind=kind)


def _held_out_wording(rng: random.Random) -> int:
    return rng.randrange(TRAIN_WORDINGS, 2 * TRAIN_WORDINGS)
