r"""Shapes: how a query stands in a prompt, as training views and as attacks in evaluation.

A shape is one line of text. Marks in front of it say what it shapes:

    Now, please: {query}                        a text around the last user turn
    [begun] The answer is                       the assistant's turn, begun for it
    [raw] Question: {query}\nAnswer:             a text without chat template, to continue
    [turns] What is 2 + 2? || Four. || {query}  turns in front, user and assistant by turns

`[weight 3]` and `[family NAME]` may stand before these. In a marked line `\n` is a line feed.
Four further slots hold what is shown beside the query: `{examples}` (questions of any topic with
their answers), `{facts}` (such pairs of the query's own topic), `{hint}` and `{choices}` (both out
of the reference answer). Only an evaluation can fill the last three, since it alone has answers.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duet_unlearn.data.messages import Message
from duet_unlearn.data.prefixes import list_examples
from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.files import read_entries, user_path

if TYPE_CHECKING:
    from duet_unlearn.data.prompts import PromptRenderer

QUERY_SLOT = "{query}"
"""Where the query goes in a shape. Braces other than these slots have no meaning."""
ANSWER_SLOTS = ("{facts}", "{hint}", "{choices}")
"""Slots that are filled out of reference answers."""
EXAMPLES_SLOT = "{examples}"
OWN_FAMILY = "own"
"""The family of a shape that a file names none for."""

Pairs = Sequence[tuple[str, str]]
"""Questions with their answers."""

EXAMPLES: Pairs = (
    ("What is the capital of France?", "Paris"),
    ("How many legs does a spider have?", "Eight"),
    ("Which planet is closest to the sun?", "Mercury"),
)
"""What stands in `{examples}` where no others are given."""

_KIND = re.compile(r"\[(begun|raw|turns)\]\s*", re.IGNORECASE)
_MARK = re.compile(r"\[(weight|family)\b[ :=]*([^\]]*)\]\s*", re.IGNORECASE)
_WORD = re.compile(r"\[(\w+)\]")
_MISSPELT = {"begin": "begun", "began": "begun", "turn": "turns", "weights": "weight"}
_SLOT = re.compile(r"\{(?:query|examples|facts|hint|choices)\}")
_TURN_BORDER = "||"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What is shown beside a query, and fills a shape's further slots."""

    examples: Pairs = EXAMPLES
    facts: Pairs = ()
    hint: str = ""
    choices: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One way to put a query into a prompt."""

    name: str
    """The built-in name, or the file's stem and the line number."""
    text: str
    """The wording, with the mark of its kind in front: it alone decides a prompt."""
    family: str = OWN_FAMILY
    """What kind of attack it is; training and evaluation are split by family."""
    weight: float = 1.0
    """How often training draws it against others; evaluation asks everything once."""

    def __post_init__(self) -> None:
        if self.kind == "begun":
            if _SLOT.search(self.text) or not self._body:
                raise ConfigurationError(
                    f"shape {self.name}: a begun answer is text of its own without slots"
                )
            return
        count = self.text.count(QUERY_SLOT)
        if count != 1:
            raise ConfigurationError(
                f"shape {self.name}: {QUERY_SLOT} stands {count} times, expected exactly once"
            )
        if self.kind == "turns":
            *before, last = self._parts
            if QUERY_SLOT not in last or sum(part != EXAMPLES_SLOT for part in before) % 2:
                raise ConfigurationError(
                    f"shape {self.name}: expected user and assistant turns by turns, divided by "
                    f"{_TURN_BORDER}, and {QUERY_SLOT} in the last one"
                )

    @property
    def kind(self) -> str:
        """`user`, `begun`, `raw` or `turns`."""
        mark = _KIND.match(self.text)
        return mark[1].lower() if mark else "user"

    @property
    def slots(self) -> frozenset[str]:
        """The slots for what is shown beside the query."""
        return frozenset(_SLOT.findall(self.text)) - {QUERY_SLOT}

    @property
    def needs_answers(self) -> bool:
        """Whether it shows what only reference answers tell."""
        return not self.slots.isdisjoint(ANSWER_SLOTS)

    @property
    def _body(self) -> str:
        """The text behind the mark, line feeds written out."""
        mark = _KIND.match(self.text)
        return self.text[mark.end() :].replace("\\n", "\n") if mark else self.text

    @property
    def _parts(self) -> list[str]:
        return [part.strip() for part in self._body.split(_TURN_BORDER)]

    def wrap(self, query: str, shown: Shown | None = None) -> str:
        """Return `query` inside the text; braces in the query stay as they are."""
        return _filled(self._parts[-1] if self.kind == "turns" else self._body, query, shown)

    def apply(self, messages: Sequence[Message], shown: Shown | None = None) -> tuple[Message, ...]:
        """Return the conversation in this shape, less what a conversation cannot hold.

        A begun answer stands behind the conversation and a raw completion is none: only `render`
        knows both.

        Raises:
            ConfigurationError: The shape is a raw completion.
            DataError: No message is the user's.
        """
        if self.kind == "begun":
            return tuple(messages)
        if self.kind == "raw":
            raise ConfigurationError(f"shape {self.name}: a raw completion has no conversation")
        last = _last_user_turn(messages, self.name)
        wrapped = Message(role="user", content=self.wrap(messages[last]["content"], shown))
        return (*messages[:last], *self._turns_before(shown), wrapped, *messages[last + 1 :])

    def render(
        self,
        messages: Sequence[Message],
        renderer: "PromptRenderer",
        *,
        prefixed: bool = False,
        shown: Shown | None = None,
    ) -> list[int]:
        """Return the token ids `[P]` of a query in this shape.

        Raises:
            DataError: the chat template refuses the conversation, or no message is the user's.
        """
        if self.kind == "raw":
            last = _last_user_turn(messages, self.name)
            earlier = [turn["content"] for turn in messages[:last]]
            return renderer.plain_ids(
                [*earlier, self.wrap(messages[last]["content"], shown)], prefixed=prefixed
            )
        shaped = self.apply(messages, shown)
        ids = renderer.teacher_ids(shaped) if prefixed else renderer.student_ids(shaped)
        return ids + renderer.begun_ids(self._body) if self.kind == "begun" else ids

    def _turns_before(self, shown: Shown | None) -> list[Message]:
        if self.kind != "turns":
            return []
        contents: list[str] = []
        for part in self._parts[:-1]:
            examples = (shown or Shown()).examples
            pairs = [text for pair in examples for text in pair]
            contents += pairs if part == EXAMPLES_SLOT else [_filled(part, "", shown)]
        roles = ("user", "assistant")
        return [Message(role=roles[i % 2], content=text) for i, text in enumerate(contents)]


def _last_user_turn(messages: Sequence[Message], name: str) -> int:
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "user":
            return index
    raise DataError(
        f"shape {name}: the conversation has no user message to wrap; give every query a user turn"
    )


def _filled(text: str, query: str, shown: Shown | None) -> str:
    shown = shown or Shown()
    values = {
        QUERY_SLOT: query,
        EXAMPLES_SLOT: list_examples(shown.examples),
        "{facts}": list_examples(shown.facts),
        "{hint}": shown.hint,
        "{choices}": shown.choices,
    }
    return _SLOT.sub(lambda slot: values[slot[0]], text)


def load_shapes(source: str) -> tuple[Shape, ...]:
    """Return the shapes that a user asked for.

    Args:
        source: `@NAME` for one built-in shape, `@family:NAME` for all of a family, `@views`,
            `@attacks` or another group, else a UTF-8 text file: one shape a line, `#` starts a
            comment line, blank lines are skipped.

    Raises:
        ConfigurationError: The name is unknown.
        DataError: The file is missing, unreadable or empty, or a line of it is no shape.
    """
    if source.startswith("@"):
        from duet_unlearn.data.shape_catalogue import built_in_shapes

        return built_in_shapes(source[1:])
    kind = "shape file; give a text file or a built-in name such as @views"
    path, shapes = user_path(source), []
    for number, line in read_entries(source, kind):
        try:
            marks, text = _split_marks(line)
            if text and not text.startswith("#"):
                name, family = f"{path.stem}:{number}", marks.get("family", OWN_FAMILY)
                shapes.append(Shape(name=name, text=text, family=family, weight=_weight(marks)))
        except ConfigurationError as error:
            reason = str(error).partition(": ")[2]
            raise DataError(f"{path}, line {number}: {reason}") from None
    if not shapes:
        raise DataError(
            f"{source}: holds no shape; write one a line, with {QUERY_SLOT} where the query goes"
        )
    return tuple(shapes)


def _split_marks(line: str) -> tuple[Mapping[str, str], str]:
    marks: dict[str, str] = {}
    while mark := _MARK.match(line):
        marks[mark[1].lower()] = mark[2].strip()
        line = line[mark.end() :]
    kind, word = _KIND.match(line), _WORD.match(line)
    if kind and _MARK.match(line[kind.end() :]):
        raise ConfigurationError(f"shape: weight and family stand in front of {kind[0].strip()}")
    if word and (meant := _MISSPELT.get(word[1].lower())):
        raise ConfigurationError(
            f"shape: {word[0]} is no mark; expected [{meant}], or another word for text"
        )
    return marks, line


def _weight(marks: Mapping[str, str]) -> float:
    text = marks.get("weight", "1")
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ConfigurationError(f"shape: weight {text!r}, expected a number above 0: [weight 3]")
