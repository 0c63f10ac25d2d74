"""What models are asked: query sets, attacks, and one task for each query in each shape."""

import dataclasses
import itertools
import logging
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from duet_unlearn.data.messages import Message
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.data.query_files import SUFFIXES, open_rows
from duet_unlearn.data.shapes import EXAMPLES, OWN_FAMILY, Shape, Shown, load_shapes
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.measures.overlap import contains_answer
from duet_unlearn.evaluation.measures.words import split_words

if TYPE_CHECKING:
    from duet_unlearn.data.prompts import PromptRenderer

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTACKED_SPLITS = ("forget", "retain")
_SHOWN_PAIRS = 3
_WRONG_CHOICES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySet:
    """The queries of one source."""

    name: str
    split: str
    """`forget`, `retain` or `general`."""
    source: str
    queries: tuple[Query, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that its queries name, in the order of their first query."""
        return tuple(dict.fromkeys(q.kind for q in self.queries if q.kind is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One way to ask: a shape, or a user's own wording of each query."""

    name: str
    text: str
    """Of the shape; for a file of wordings, where it lies and which of a query's it is."""
    family: str = OWN_FAMILY
    shape: Shape | None = None
    wordings: dict[str, tuple[Message, ...]] | None = None
    """By the text of the query as its set has it."""

    @property
    def needs_answers(self) -> bool:
        """Whether it shows reference answers."""
        return self.shape is not None and self.shape.needs_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One query, plainly or under one attack."""

    set_name: str
    query: Query
    attack: Attack | None = None
    shown: Shown | None = None
    """What the attack shows beside the query."""

    @property
    def attack_name(self) -> str | None:
        """The attack's name; None where the query is asked plainly."""
        return None if self.attack is None else self.attack.name

    def render(self, renderer: "PromptRenderer", *, prefixed: bool = False) -> list[int]:
        """Return the prompt's token ids `[P]`, with the renderer's prefix if `prefixed`.

        Raises:
            DataError: The chat template refuses the conversation.
        """
        messages = self.query.messages
        if self.attack is not None and self.attack.shape is not None:
            shape = self.attack.shape
            return shape.render(messages, renderer, prefixed=prefixed, shown=self.shown)
        if self.attack is not None and self.attack.wordings is not None:
            messages = self.attack.wordings[self.query.text]
        return renderer.teacher_ids(messages) if prefixed else renderer.student_ids(messages)


def load_attacks(sources: Sequence[str]) -> tuple[Attack, ...]:
    """Return all attacks, each text once, under names that differ.

    A source is what `load_shapes` takes, or a query file whose rows say in `asked` (text) how the
    query in `query` is asked instead: synonyms, translations, reverse questions. Its attack has
    the file's stem for name and family, and asks only the queries that the file has; the second
    wordings of queries that have several are an attack of their own, and so on.

    Raises:
        ConfigurationError: A built-in name is unknown.
        DataError: A file is missing, unreadable or malformed.
    """
    attacks: dict[str, Attack] = {}
    texts: set[str] = set()
    for source in sources:
        for attack in _load(source):
            if attack.text not in texts:
                texts.add(attack.text)
                name = unused_name(attack.name, attacks)
                attacks[name] = dataclasses.replace(attack, name=name)
    return tuple(attacks.values())


def without_answers(attacks: Sequence[Attack]) -> tuple[Attack, ...]:
    """Leave out, with a warning, the attacks that show reference answers where there are none."""
    fitting = tuple(attack for attack in attacks if not attack.needs_answers)
    if left := [attack.name for attack in attacks if attack not in fitting]:
        logger.warning(
            "left out, as they show reference answers and there are none: %s", ", ".join(left)
        )
    return fitting


def unused_name(name: str, known: Collection[str]) -> str:
    """Return a name, with the first number behind it that makes it differ."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in known)


def _load(source: str) -> list[Attack]:
    if not source.startswith("@") and Path(source).suffix.lower() in SUFFIXES:
        name = Path(source).stem
        return [
            Attack(
                name=name,
                text=source if number == 1 else f"{source} ({number})",
                family=name,
                wordings=wordings,
            )
            for number, wordings in enumerate(_load_wordings(source), start=1)
        ]
    return [
        Attack(name=shape.name, text=shape.text, family=shape.family, shape=shape)
        for shape in load_shapes(source)
    ]


def _load_wordings(source: str) -> list[dict[str, tuple[Message, ...]]]:
    """Return the first wording of each query, then the second of those that have one, and so on."""
    found: dict[str, list[str]] = {}
    for place, row in open_rows(source, needs_one_of=("query", "asked")):
        query, asked = row.get("query"), row.get("asked")
        if not (isinstance(query, str) and isinstance(asked, str) and query and asked.strip()):
            raise DataError(
                f"{place}: expected text in `query` and in `asked`, the wording that "
                "is asked instead"
            )
        if asked not in (wordings := found.setdefault(query, [])):
            wordings.append(asked)
    if not found:
        raise DataError(f"{source}: no wordings in it; expected at least one row")
    return [
        {
            query: (Message(role="user", content=wordings[number]),)
            for query, wordings in found.items()
            if number < len(wordings)
        }
        for number in range(max(map(len, found.values())))
    ]


def load_sets(
    sources: Sequence[tuple[str, str]], *, limit: int | None = None, answered: bool = True
) -> tuple[QuerySet, ...]:
    """Return all query sets, each named by its split and, where the split has several, its file.

    Sets with the same queries, such as the general ones of two kits, are one.

    Args:
        sources: split and source of each set.
        limit: most queries of a set; they are spread evenly over it.
        answered: whether every query must have its answer; those of a kit have in any case.

    Raises:
        DataError: A source cannot be read, or a query has no answer.
    """
    found: list[tuple[str, str, tuple[Query, ...]]] = []
    known: dict[tuple[str, frozenset[tuple[str, str | None]]], str] = {}
    for split, source in sources:
        # What a kit's name stands for follows from this: its held-out queries.
        required = answered or source.startswith("@")
        queries = load_queries(source, split=split, require_answers=required)
        chosen = tuple(spread(queries, limit))
        asked = split, frozenset((query.text, query.answer) for query in chosen)
        if asked in known:
            logger.info("%s: the same queries as those of %s, asked once", source, known[asked])
        else:
            known[asked] = source
            found.append((split, source, chosen))
    sets: list[QuerySet] = []
    for split, source, chosen in found:
        alone = sum(other == split for other, *_ in found) == 1
        name = unused_name(
            split if alone else f"{split} {Path(source).stem}", [s.name for s in sets]
        )
        sets.append(QuerySet(name=name, split=split, source=source, queries=chosen))
    return tuple(sets)


def load_answered(sources: Iterable[str], *, split: str) -> list[Query]:
    """Return the queries of several sources, all with answers; of kits, the held-out ones."""
    return [
        query
        for source in sources
        for query in load_queries(source, split=split, require_answers=True)
    ]


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` items, None for all, evenly spread: files are often sorted by kind."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def list_tasks(sets: Sequence[QuerySet], attacks: Sequence[Attack]) -> tuple[Task, ...]:
    """Return every query plainly, then every forget and retain query under each attack."""
    pools = {
        split: [query for s in sets if s.split == split for query in s.queries]
        for split in ATTACKED_SPLITS
    }
    plain = [Task(set_name=s.name, query=query) for s in sets for query in s.queries]
    attacked = [
        Task(set_name=s.name, query=query, attack=attack, shown=_shown(attack, query, pools))
        for attack in attacks
        for s in sets
        if s.split in ATTACKED_SPLITS
        for query in s.queries
        if attack.wordings is None or query.text in attack.wordings
    ]
    counts = Counter(task.attack_name for task in attacked)
    asked = sum(len(pool) for pool in pools.values())
    for attack in attacks:
        if (found := counts[attack.name]) < asked:
            logger.warning(
                "attack %s: asks %d of %d queries, those whose text is in its column `query`",
                attack.name,
                found,
                asked,
            )
    return (*plain, *attacked)


def check_length(task: Task, length: int, label: str, limit: int | None, new_tokens: int) -> None:
    """Refuse a prompt that is empty or leaves no room for its answer.

    Raises:
        DataError: It is one of the two.
    """
    where = f"query {task.query.query_id} of {task.set_name}"
    if task.attack is not None:
        where += f" under attack {task.attack.name}"
    if length == 0:
        raise DataError(f"{where}: its prompt has no token in model {label}; write a longer query")
    if limit is not None and length + new_tokens > limit:
        raise DataError(
            f"{where}: {length} tokens of prompt and {new_tokens} of answer do not fit into the "
            f"{limit} that {label} reads; shorten the query or lower --max-new-tokens"
        )


def _shown(attack: Attack, query: Query, pools: dict[str, list[Query]]) -> Shown | None:
    """What a shape with further slots shows beside a query; the same in every evaluation."""
    if attack.shape is None or not attack.shape.slots:
        return None
    generator = random.Random(query.query_id)
    answer = query.answer or ""
    right = {"", None, *query.references}
    wrong = sorted({q.answer or "" for q in pools[query.split] if q.answer not in right})
    choices = [answer, *generator.sample(wrong, min(_WRONG_CHOICES, len(wrong)))]
    generator.shuffle(choices)
    return Shown(
        examples=_pairs(query, pools["retain"], generator) or EXAMPLES,
        facts=_pairs(query, pools[query.split], generator),
        hint=f"the answer begins with {answer[:1]!r} and has {len(split_words(answer))} words",
        choices="\n".join(f"- {choice}" for choice in choices),
    )


def _tells(shown: Query, asked: Query) -> bool:
    said = f"{shown.messages[-1]['content']} {shown.answer}"
    return any(contains_answer(reference, said) for reference in asked.references)


def _pairs(query: Query, pool: Sequence[Query], generator: random.Random) -> list[tuple[str, str]]:
    """Other queries with their answers, none of which tells the answer that is asked for."""
    others = [q for q in pool if q.answer and q.answer != query.answer]
    taken = generator.sample(others, min(_SHOWN_PAIRS, len(others)))
    if any(_tells(q, query) for q in taken):
        others = [q for q in others if not _tells(q, query)]
        taken = generator.sample(others, min(_SHOWN_PAIRS, len(others)))
    return [(q.messages[-1]["content"], q.answer or "") for q in taken]
