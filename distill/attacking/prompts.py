"""Where an attack stands: at the end of the last user turn, in front of the template's markup."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from duet_unlearn.data.insertions import insertion_places
from duet_unlearn.data.messages import Message
from duet_unlearn.data.queries import Query
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.subjects import Subject

_SPACER = " !"
"""What a suffix is made of before it is searched."""
_MEASURED = 16
"""So many spacers tell how many tokens one has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The token ids of one query, apart at the place of the attack."""

    query: Query
    before: list[int]
    inserted: list[int]
    """What a suffix of spacers becomes there."""
    after: list[int]
    answer: list[int]
    """The reference answer and the end of sequence."""

    def holding(self, ids: Sequence[int]) -> list[int]:
        """Return the prompt with something at the place."""
        return [*self.before, *ids, *self.after]


def render(subject: Subject, label: str, query: Query, suffix: str = "") -> list[int]:
    """Return one row's prompt with a suffix behind the text of the last user turn."""
    *turns, last = query.messages
    messages = [*turns, Message(role=last["role"], content=last["content"] + suffix)]
    renderer = subject.renderer
    return (renderer.teacher_ids if subject.rows[label] else renderer.student_ids)(messages)


def open_prompts(
    subject: Subject, label: str, queries: Sequence[Query], *, suffix_tokens: int
) -> list[Prompt]:
    """Return the prompts of one row.

    Raises:
        DataError: The tokenizer joins a query with what stands behind it.
    """
    measured = len(subject.renderer.begun_ids(_SPACER * _MEASURED))
    count = math.ceil(suffix_tokens * _MEASURED / measured)
    ends = subject.renderer.closing_ids(subject.ends)
    prompts = []
    for query in queries:
        plain = render(subject, label, query)
        full = render(subject, label, query, _SPACER * count)
        places = insertion_places(plain, full)
        if not places or len(full) == len(plain):
            raise DataError(
                f"query {query.query_id}: the tokenizer of {subject.label} joins its end with a "
                "suffix, so that none can be searched; end it with a full stop, or leave it out"
            )
        at, length = places[-1], len(full) - len(plain)
        answer = [*subject.renderer.begun_ids(query.answer or ""), *ends]
        prompts.append(
            Prompt(
                query=query,
                before=plain[:at],
                inserted=full[at : at + length],
                after=plain[at:],
                answer=answer,
            )
        )
    return prompts
