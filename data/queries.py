"""Query sets: what a user would ask, read from a file, a hub dataset or a kit.

A row holds its query in `query`, `question` or `messages` (the first of the three that has a
value), and may hold `id`, `answer`, `aliases`, `kind` and `wrong_answers`. Text is kept exactly as
it is written: no stripping, no Unicode normalisation, because the cache stores the tokens of this
very text.
A bad row is an error that names the file and the line, never a row that is quietly left out.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from duet_unlearn.data.kits import find_kit, refuse_kit
from duet_unlearn.data.messages import (
    Message,
    check_messages,
    check_text,
    text_from_messages,
    text_in_view,
    text_of_sample,
    type_name,
)
from duet_unlearn.data.query_files import Rows, open_rows
from duet_unlearn.data.shapes import Shape
from duet_unlearn.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger(__name__)

SPLITS = ("forget", "retain", "general", "train")
WORD_JOINER = "\u2060"
VIEW_MARK = "@"
"""Between a query's id and the name of the view that it is in."""
QUERY_COLUMNS = ("query", "question", "messages")
RESPONSE_COLUMNS = ("response", "answer")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Given:
    """A response that was given for a query, or a stretch of it, as tokens."""

    text: str
    """What tells the row from others, beside its split."""
    prompt_ids: "npt.NDArray[np.int32]"
    """What stands before it, `[P]`."""
    response_ids: "npt.NDArray[np.int32]"
    """`[T]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query of a split; two queries with the same `query_id` and split are the same query."""

    query_id: str
    """The user's id, or `q-` and 16 hex digits that follow from split and text."""
    split: str
    """`forget`, `retain`, `train`, or (in evaluation only) `general`."""
    messages: tuple[Message, ...]
    """The conversation; it ends with a user turn, or with the assistant's where the response is
    given. A plain query is one user turn, a document one turn of the assistant's."""
    answer: str | None = None
    """The reference answer. Evaluation reads it; it never enters a cache."""
    kind: str | None = None
    """A label by which evaluation scores parts of a split apart."""
    aliases: tuple[str, ...] = ()
    """Other forms of the answer that are as right: `dwarves` beside `dwarf`."""
    wrong_answers: tuple[str, ...] = ()
    """Answers that are wrong, for the truth ratio; evaluation alone reads them."""

    view: Shape | None = None
    """The shape in which it is asked; None asks it plainly."""
    given: Given | None = None
    """The tokens to score; None decodes a response."""
    sample: int = 1
    """Which of its sampled answers is meant, from 1."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"split {self.split!r} is unknown: expected one of {', '.join(SPLITS)}")

    @classmethod
    def from_text(cls, text: str, *, split: str, query_id: str | None = None) -> "Query":
        """A query from one line of text, as a user types it."""
        messages = (Message(role="user", content=text),)
        return cls(
            query_id=query_id or hashed_id(split, text_from_messages(messages)),
            split=split,
            messages=messages,
        )

    def in_view(self, view: Shape) -> "Query":
        """Return the same query in a shape, under an id of its own."""
        return replace(self, query_id=f"{self.query_id}{VIEW_MARK}{view.name}", view=view)

    def as_sample(self, number: int) -> "Query":
        """Return the query for one of its sampled answers, from the second on under its own id."""
        if number == 1:
            return self
        return replace(self, query_id=f"{self.query_id}~{number}", sample=number)

    def as_plain_text(self, control_tokens: Iterable[str]) -> "Query":
        """Return the same query with an invisible word joiner in each control token it spells.

        The tokenizer then reads what is typed as text. The id stays.
        """
        contents = [turn["content"] for turn in self.messages]
        for token in control_tokens:
            joined = token[:1] + WORD_JOINER + token[1:]
            contents = [content.replace(token, joined) for content in contents]
        turns = zip(self.messages, contents, strict=True)
        messages = tuple(Message(role=turn["role"], content=content) for turn, content in turns)
        return replace(self, messages=messages)

    @property
    def references(self) -> tuple[str, ...]:
        """The reference answer and its other forms; a response scores by the one it is next to."""
        return (self.answer or "", *self.aliases)

    @property
    def text(self) -> str:
        """The query as one string; `split_view` and `messages_from_text` turn it back."""
        if self.given is not None:
            return self.given.text
        text = text_from_messages(self.messages)
        if self.sample > 1:
            return text_of_sample(self.sample, text)
        return text if self.view is None else text_in_view(self.view.text, text)


def fingerprint_queries(queries: Iterable[Query]) -> str:
    """A digest of ids, splits and texts that does not depend on the order of the queries.

    Returns:
        `sha256:` and 64 hex digits.
    """
    rows = ((query.query_id, query.split, query.text) for query in queries)
    return fingerprint_hashes(map(hash_row, rows))


def hash_row(row: tuple[str, str, str]) -> bytes:
    """The 32 bytes that stand for `(query_id, split, text)` in `fingerprint_hashes`."""
    return hashlib.sha256(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")).digest()


def fingerprint_hashes(hashes: Iterable[bytes]) -> str:
    """The same digest from `hash_row` of each query: of the sorted hashes, put together."""
    return "sha256:" + hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def load_responses(source: str) -> list[Query]:
    """Read queries with given responses, or documents, of the split `train`; see `load_queries`.

    A row is `messages` whose last turn is the assistant's, a query (also named `prompt`) with a
    `response` or `answer`, or a `text`: a document.

    Raises:
        DataError: as in `load_queries`, and where the source is a kit.
    """
    refuse_kit(source)
    return _load(
        open_rows(source, needs_one_of=(*QUERY_COLUMNS, "prompt", "text")),
        source,
        lambda row: _query_from_row(row, "train", _answered_messages(row)),
    )


def load_queries(source: str, *, split: str, require_answers: bool = False) -> list[Query]:
    """Read all queries of a source, in its order, each one once.

    Rows with the same id and text (where a row has no id: the same text) collapse to the first
    of them; how many did is logged.

    Args:
        source: a `.jsonl`, `.json`, `.csv` or `.parquet` file, `hub:NAME[:CONFIG][:SPLIT]`, or
            `@NAME` for a query kit.
        split: of the queries.
        require_answers: whether a row without `answer` is an error; of a kit, take the held-out
            queries.

    Raises:
        DataError: the source cannot be read, holds no query, or has a bad row; the message
            names the line.
    """
    if kit := find_kit(source):
        return [
            query
            for path in kit.files(split, answers=require_answers)
            for query in load_queries(str(path), split=split, require_answers=require_answers)
        ]

    def read(row: Mapping[str, object]) -> Query:
        query = _query_from_row(row, split, _messages_of_row(row))
        if require_answers and query.answer is None:
            raise ValueError("no answer; evaluation needs a value in the column `answer`")
        return query

    return _load(open_rows(source, needs_one_of=QUERY_COLUMNS), source, read)


def _load(rows: Rows, source: str, read: Callable[[Mapping[str, object]], Query]) -> list[Query]:
    kept: dict[str, tuple[Query, str]] = {}
    duplicates = 0
    for place, row in rows:
        try:
            query = read(row)
            first, first_place = kept.setdefault(query.query_id, (query, place))
            duplicates += first is not query
            if first.messages != query.messages:
                raise ValueError(
                    f"id {query.query_id!r} already belongs to another query at {first_place}; "
                    "give each query its own id"
                )
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
    if not kept:
        raise DataError(f"{source}: no queries in it; expected at least one row")
    if duplicates:
        logger.info("%s: %d duplicate rows left out, %d kept", source, duplicates, len(kept))
    return [query for query, _ in kept.values()]


def _query_from_row(row: Mapping[str, object], split: str, messages: tuple[Message, ...]) -> Query:
    """One query, or a ValueError that says what is wrong with the row."""
    return Query(
        query_id=_label(row, "id") or hashed_id(split, text_from_messages(messages)),
        split=split,
        messages=messages,
        answer=_label(row, "answer"),
        kind=_label(row, "kind"),
        aliases=_texts(row, "aliases"),
        wrong_answers=_texts(row, "wrong_answers"),
    )


def _answered_messages(row: Mapping[str, object]) -> tuple[Message, ...]:
    """A conversation that ends with the assistant's turn, or a document as such a turn alone."""
    columns = (*QUERY_COLUMNS, "prompt", "text")
    first = next((name for name in columns if row.get(name) not in (None, "", [])), "")
    turns: tuple[Message, ...] = ()
    if first == "text":
        answer = row["text"]
    else:
        turns = _messages_of_row(row, (*QUERY_COLUMNS, "prompt"), answered=True)
        if turns[-1]["role"] == "assistant":
            return turns
        first = next((name for name in RESPONSE_COLUMNS if row.get(name) is not None), "response")
        answer = row.get(first)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(
            "no response; expected text in `response`, `answer` or `text`, or `messages` that end "
            f"with the assistant's turn, found {type_name(answer)} in `{first}`"
        )
    return (*turns, Message(role="assistant", content=check_text(answer, first)))


def _messages_of_row(
    row: Mapping[str, object], columns: Sequence[str] = QUERY_COLUMNS, *, answered: bool = False
) -> tuple[Message, ...]:
    for column in columns:
        value = row.get(column)
        # An empty cell says "see the next column"; blanks were typed, and are a mistake.
        if value is None or value == "" or value == []:
            continue
        if column == "messages":
            return check_messages(_decode_messages(value), answered=answered)
        if not isinstance(value, str):
            raise ValueError(f"`{column}` must be text, found {type_name(value)}")
        if not value.strip():
            raise ValueError(f"`{column}` is blank; remove the row or fill in the query")
        return (Message(role="user", content=check_text(value, column)),)
    found = ", ".join(row) or "none"
    raise ValueError(
        f"no query; expected a value in `query`, `question` or `messages` (columns: {found})"
    )


def _decode_messages(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`messages` is text but not JSON ({error})") from None


def _label(row: Mapping[str, object], column: str) -> str | None:
    """The value of an optional column as text; None for an empty cell, null or NaN."""
    value = row.get(column)
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return check_text(value, column) if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`{column}` must be text or a number, found {type_name(value)}")
    # A column of whole numbers with gaps arrives as floats: 1979.0 was written as 1979.
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value)


def _texts(row: Mapping[str, object], column: str) -> tuple[str, ...]:
    """The texts of an optional column that lists some, in a CSV file as JSON, or that is one."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            listed = json.loads(value)
        except (ValueError, RecursionError):
            listed = value
        value = listed if isinstance(listed, list) or listed is None else [value]
    if value is None or value == "" or value != value:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"`{column}` must list texts, found {type_name(value)}")
    texts: list[str] = []
    for text in value:
        if not isinstance(text, str) or not text.strip():
            found = "blank text" if isinstance(text, str) else type_name(text)
            raise ValueError(f"`{column}` must list texts, found {found} among them")
        texts.append(check_text(text, column))
    return tuple(texts)


def hashed_id(split: str, text: str) -> str:
    """The id of a query that its file gives none."""
    return "q-" + hashlib.sha256(f"{split}\0{text}".encode()).hexdigest()[:16]
