"""Conversations: what one looks like, how it is checked, and how it is written as one text."""

import contextlib
import json
from collections.abc import Iterable
from typing import TypedDict

STRETCH = '["tokens '
"""How the text of a row begins that is a stretch of a longer one."""
_SAMPLE = '["sample", "'
ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


def text_from_messages(messages: Iterable[Message]) -> str:
    """One user turn's content as it is, or several turns as a JSON list.

    A content that itself reads as such a list, or as a query in a view or a sample, is written as a
    list too, so that no two conversations share a text.
    """
    turns = tuple(messages)
    if len(turns) == 1 and turns[0]["role"] == "user":
        content = turns[0]["content"]
        if _parse(content) is None and query_of_row(content) == content:
            return content
    # Built anew with a fixed order of keys: the text decides ids and fingerprints.
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    return json.dumps(plain, ensure_ascii=False)


def messages_from_text(text: str) -> tuple[Message, ...]:
    """The conversation of a `Query.text`, for instance of the cache's `query` column."""
    parsed = _parse(text)
    return parsed if parsed is not None else (Message(role="user", content=text),)


def text_in_view(view: str, query: str) -> str:
    """The text of a query that is asked in a shape: a JSON list of the two."""
    return json.dumps([view, query], ensure_ascii=False)


def split_view(text: str) -> tuple[str | None, str]:
    """Return the shape's text and the query's of a row, the first None for a plain query.

    No plain query is such a list: a conversation is a list of objects, and text that looks like a
    view is stored as one.
    """
    if text.startswith('["'):
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(text):
                case [str(view), str(query)]:
                    return view, query
    return None, text


def text_of_sample(number: int, query: str) -> str:
    """The text of a row that holds a further sample of a query's answer, from the second on."""
    return json.dumps(["sample", str(number), query], ensure_ascii=False)


def query_of_row(text: str) -> str:
    """The query's text alone of a row's: without a view or a sample's number."""
    if text.startswith(_SAMPLE):
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(text):
                case [_, _, str(query)]:
                    return query
    return split_view(text)[1]


def asked_text(text: str) -> str:
    """The query alone of a row's text, without a given response either."""
    query = query_of_row(text)
    turns = messages_from_text(query)
    answered = len(turns) > 1 and turns[-1]["role"] == "assistant"
    return text_from_messages(turns[:-1]) if answered else query


def check_messages(value: object, *, answered: bool = False) -> tuple[Message, ...]:
    """A conversation out of parsed JSON or Arrow, with `role` and `content` in each turn.

    Args:
        value: the turns.
        answered: whether an assistant's turn may be the last, too.

    Raises:
        ValueError: it is not a list of turns that ends with a user turn; the message says which
            turn is wrong.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"`messages` must be a list of turns, found {type_name(value)}")
    turns = tuple(_check_turn(turn, number) for number, turn in enumerate(value, start=1))
    if turns[-1]["role"] not in ("user", "assistant")[: 1 + answered]:
        raise ValueError(f"`messages` must end with a user turn, found {turns[-1]['role']!r} last")
    if not turns[-1]["content"].strip():
        raise ValueError("the last turn of `messages` is blank; remove the row or fill it in")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise ValueError("a system turn of `messages` must stand first")
    return turns


def check_text(text: str, column: str) -> str:
    """The text as it is, unless it cannot be encoded.

    Raises:
        ValueError: the text has a surrogate without its other half.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{column}` has half a surrogate pair (U+{ord(text[error.start]):04X}) at "
            f"character {error.start + 1}: no tokenizer takes it, repair the text"
        ) from None
    return text


def type_name(value: object) -> str:
    """What a value of parsed JSON is, in the words of an error message."""
    names = {
        "NoneType": "nothing",
        "int": "a number",
        "float": "a number",
        "str": "text",
        "list": "a list" if value else "an empty list",
        "dict": "an object",
        "bool": "true or false",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _check_turn(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} of `messages` must be an object with role and content")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise ValueError(
            f"turn {number} of `messages` has role {role!r}: expected {', '.join(ROLES[:-1])} "
            f"or {ROLES[-1]}"
        )
    if not isinstance(content, str):
        raise ValueError(f"content of turn {number} must be text, found {type_name(content)}")
    # Arrow fills the fields that only other rows use with None; a set field changes the prompt.
    extra = [key for key in turn if key not in ("role", "content") and turn[key] is not None]
    if extra:
        raise ValueError(f"turn {number} of `messages` has {extra[0]!r} beside role and content")
    return Message(role=role, content=check_text(content, "messages"))


def _parse(text: str) -> tuple[Message, ...] | None:
    """The turns that a text spells as JSON, or None where it is a plain query."""
    if not text.startswith("["):
        return None
    try:
        return check_messages(json.loads(text), answered=True)
    except (ValueError, RecursionError):
        return None
