"""Lessons: what a model is fine-tuned on, and which queries that leaves to be asked.

A query that was taught, or another one with a taught answer, proves nothing: it is not asked. So
what comes back is knowledge that the lessons do not hold.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from duet_unlearn.data.models.folder import context_length, read_config
from duet_unlearn.data.queries import Query
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.measures.words import split_words
from duet_unlearn.evaluation.subjects import Subject
from duet_unlearn.evaluation.tasks import load_answered, spread, unused_name
from duet_unlearn.files import read_text, user_path

TEXT_SUFFIXES = (".txt", ".md")
_PIECE_TOKENS = 256
"""Plain text is cut into lessons of at most so many tokens."""

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of what is learned behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What is taught from one source, and what is asked then."""

    name: str
    source: str
    queries: tuple[Query, ...] = ()
    """With the answers that are taught."""
    texts: tuple[str, ...] = ()
    """Paragraphs that are taught as they are."""
    asked: tuple[Query, ...]
    """The forget queries that it does not teach."""

    @property
    def taught(self) -> int:
        """How many answers or paragraphs it has."""
        return len(self.queries) + len(self.texts)

    def encode(self, subject: Subject) -> list[Pair]:
        """Return what is taught as token ids.

        Raises:
            DataError: A query with its answer is too long for the model, or nothing is taught.
        """
        ends = subject.renderer.closing_ids(subject.ends)
        context = context_length(read_config(subject.folder))
        pairs = []
        for query in self.queries:
            prompt = list(subject.renderer.student_ids(query.messages))
            answer = [*subject.renderer.begun_ids(query.answer or ""), *ends]
            if context is not None and len(prompt) + len(answer) > context:
                raise DataError(
                    f"query {query.query_id} of {self.source}: {len(prompt) + len(answer)} tokens "
                    f"with its answer, but {subject.label} reads {context}; shorten it"
                )
            pairs.append((prompt, answer))
        length = min(_PIECE_TOKENS, context or _PIECE_TOKENS)
        for text in self.texts:
            ids = subject.renderer.plain_ids([text])
            # The first token has nothing before it to be predicted from.
            cuts = [ids[at : at + length] for at in range(0, len(ids), length)]
            pairs += [(cut[:1], cut[1:]) for cut in cuts if len(cut) > 1]
        if not pairs:
            raise DataError(
                f"{self.source}: each paragraph is one token for {subject.label}, and what follows "
                "a token is what is taught; expected longer ones"
            )
        return pairs


def list_lessons(config: RelearnConfig) -> tuple[Lesson, ...]:
    """Read the lessons and decide what each leaves to be asked.

    Raises:
        DataError: A source cannot be read, a query in it has no answer, or a lesson leaves nothing
            to be asked.
    """
    forget = load_answered(config.forget, split="forget")
    lessons: dict[str, Lesson] = {}
    for source in config.lessons:
        lesson = _open_lesson(config, source, forget)
        name = unused_name(lesson.name, lessons)
        lessons[name] = replace(lesson, name=name)
    return tuple(lessons.values())


def _open_lesson(config: RelearnConfig, source: str, forget: Sequence[Query]) -> Lesson:
    name = source if source.startswith(("@", "hub:")) else Path(source).stem
    if Path(source).suffix.lower() in TEXT_SUFFIXES:
        asked = tuple(spread(forget, config.limit))
        return Lesson(name=name, source=source, texts=_paragraphs(source), asked=asked)
    taught = load_answered([source], split="forget")
    if _place(source) in map(_place, config.forget):
        name = f"{config.share:.0%} of {name}"
        count = round(config.share * len(taught))
        taught = random.Random(config.seed).sample(taught, count)
    others = untaught(forget, taught)
    if not taught or not others:
        raise DataError(
            f"{source}: teaching {len(taught)} of its queries leaves {len(others)} of "
            f"{len(forget)} forget queries that it does not teach, expected at least one of both; "
            "change --share, or ask other queries"
        )
    asked = tuple(spread(others, config.limit))
    return Lesson(name=name, source=source, queries=tuple(taught), asked=asked)


def _place(source: str) -> str:
    """Return what two names of one source have in common."""
    named = source.startswith(("@", "hub:"))
    return source if named else os.path.realpath(user_path(source, "query file"))


def untaught(queries: Sequence[Query], taught: Sequence[Query]) -> list[Query]:
    """Return the queries of which neither the text nor the answer is taught."""
    texts = {query.text for query in taught}
    answers = {answer for query in taught for answer in _plain(query)}
    return [q for q in queries if q.text not in texts and answers.isdisjoint(_plain(q))]


def _plain(query: Query) -> set[tuple[str, ...]]:
    return {split_words(answer) or (answer.strip(),) for answer in query.references}


def _paragraphs(source: str) -> tuple[str, ...]:
    text = read_text(source, "text file; check the name")
    found = tuple(part.strip() for part in text.split("\n\n") if part.strip())
    if not found:
        raise DataError(f"{source}: no text in it; expected paragraphs with blank lines between")
    return found
