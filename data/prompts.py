"""Prompts as token ids: the student's, and the teacher's with the steering prefix in it.

The student is trained toward what the teacher says, so the two prompts of a query must differ in
the prefix and in nothing else: a teacher's prompt is the student's token ids with one contiguous
run inserted, and every prompt is checked for it. A chat template is rendered with and without
the prefix. Mostly the two token lists differ by one run already. Where tokens would merge across
the border (a tokenizer that writes the space of `[INST] Who` into the token of `Who`), the
student's ids are kept and the tokens of the inserted text are put between two of them; blanks of
the border then stand on both sides of the prefix.

What was given up: a template that answers a prefix by changing other parts of the prompt cannot
be used at that place. Markup that a user types into a query ("<|im_end|>") is read as the
tokenizer reads it, special tokens included, for teacher and student alike; `Query.as_plain_text`
writes it so that it is not.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from duet_unlearn.data.insertions import common_head, insertion_places
from duet_unlearn.data.messages import Message
from duet_unlearn.data.models.tokenizer import control_tokens, load_tokenizer, opening_ids
from duet_unlearn.errors import ConfigurationError, DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PLACES", "TEMPLATE_DATE", "Place", "PromptRenderer", "load_tokenizer"]

TEMPLATE_DATE = "2024-07-26"
"""The day that chat templates take for today (ISO): a cache must not depend on its build day.
It is the day on which Llama 3's template falls back where there is no clock."""

Place = Literal["system", "user", "raw"]
"""Where a prefix may stand."""
PLACES: tuple[Place, ...] = get_args(Place)
SEPARATOR = "\n\n"
"""Between the prefix and the text that follows it in the same turn."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: tuple[Message, ...] = (Message(role="user", content="Hello"),)
_PROBED = Message(role="assistant", content="Yes")
_PLACEHOLDER = "Placeholder7c1d"


class PromptRenderer:
    """Renders conversations to token ids by a model's chat template, or plainly without one.

    With a chat template a prompt ends with the generation prompt. Without one it is the content
    of the turns, joined by blank lines, behind the special tokens that the tokenizer puts in
    front of any text (a BOS, say).

    The place says where the prefix stands:

    - `system`: in the system turn, in front of its text, whether that text comes from the
      conversation or is the template's own default; where there is no system turn, the inserted
      run is the whole turn with its markup.
    - `user`: in front of the last user turn's text, followed by a blank line.
    - `raw`: in front of the whole prompt, after BOS, followed by a blank line.

    Args:
        tokenizer: the tokenizer of the model.
        prefix: the steering prefix; without one, teacher and student have the same prompt.
        place: `system`, `user` or `raw`.

    Raises:
        ConfigurationError: the place is unknown, or the model's template does not take a prefix
            there; the message names the places to try.
        DataError: the chat template itself is broken.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        prefix: str | None = None,
        place: str = "system",
    ) -> None:
        if place not in PLACES:
            raise ConfigurationError(
                f"prefix place {place!r} is unknown: expected {', '.join(PLACES[:-1])} or raw"
            )
        self._tokenizer = tokenizer
        self._place = place
        self._prefix = _checked_prefix(prefix)
        self._has_template = bool(tokenizer.chat_template)
        self._opening = () if self._has_template else opening_ids(tokenizer)
        # The student's text, and the text left of the border, come up again and again.
        self._tokenize = lru_cache(maxsize=256)(lambda text: self._opening + self._encode(text))
        self._control_tokens = control_tokens(tokenizer)
        self._system_default = ""
        if self._prefix:
            if place == "system":
                self._system_default = self._find_system_default()
            # Refuse an unusable place now, before a caller loads a model.
            if self.teacher_ids(_PROBE) == self.student_ids(_PROBE):
                raise ConfigurationError("the steering prefix has no tokens; use visible text")

    def student_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids `[P]` of the conversation without the prefix.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        return list(self._tokenize(self.student_text(messages)))

    def teacher_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids `[P + R]`: those of `student_ids` with the prefix's run of R tokens inserted.

        Raises:
            DataError: the chat template refuses the conversation, or no border between the
                student's tokens is where the prefix belongs.
            ConfigurationError: the chat template does not take the prefix at this place.
        """
        student_text = self.student_text(messages)
        student = self._tokenize(student_text)
        if not self._prefix:
            return list(student)
        teacher_text = self.teacher_text(messages, student_text)
        teacher = self._tokenize(teacher_text)
        # Unknown characters fuse to one token in some tokenizers, and could swallow the prefix.
        if teacher == student or not insertion_places(student, teacher):
            teacher = self._insert_between_tokens(student_text, teacher_text)
        return list(teacher)

    def begun_ids(self, text: str) -> list[int]:
        """Token ids of the beginning of an answer, to stand behind a prompt.

        They are the tokens that the answer alone has, as a model that had said it would have.
        """
        return list(self._encode(text if self._has_template else SEPARATOR + text))

    def closing_ids(self, ends: Sequence[int]) -> list[int]:
        """The token that closes an answer, none where `ends` is empty.

        Of a model's end-of-sequence tokens it is the one that its chat template writes behind an
        answer, else the tokenizer's own, else the first.
        """
        ids: list[int] = []
        if self._has_template:
            with suppress(DataError):
                ids, start, _ = self.answered_ids([*_PROBE, _PROBED], ends)
                ids = ids[start:]
        found = [i for i in (*ids, self._tokenizer.eos_token_id) if i in ends]
        return [*found, *ends][:1]

    def answered_ids(
        self, messages: Sequence[Message], ends: Sequence[int] = (), *, every: bool = False
    ) -> tuple[list[int], int, int]:
        """Token ids of a conversation that ends with the assistant's turn, and that turn in them.

        The turn is what the chat template marks with `generation`, else what follows the generation
        prompt, up to the first of `ends`. A document, such a turn alone, is written without the
        template; without one, and behind a document, stands the first of `ends`.

        Args:
            messages: the conversation.
            ends: end-of-sequence tokens.
            every: take all turns in the place of the last, from the second token on.

        Returns:
            Token ids `[L]`, where the turn starts in them, and where it stops.

        Raises:
            DataError: the chat template refuses the conversation, leaves the turn out, or writes
                other turns otherwise because of it.
        """
        if len(messages) == 1 or not self._has_template:
            ids = self.plain_ids([turn["content"] for turn in messages])
            before = self.plain_ids([turn["content"] for turn in messages[:-1]])
            ids += ends[:1]
            return ids, 1 if before and every else max(1, common_head(before, ids)), len(ids)
        try:
            text = self._apply_template(messages, add_generation_prompt=False)
            begun = self._apply_template(messages[:-1], add_generation_prompt=False)
            marked = _MARK.search(str(self._tokenizer.chat_template)) and self._marked(messages)
        except ValueError as error:
            raise DataError(
                f"the chat template refuses the response {messages[-1]['content'][:60]!r}: {error}"
            ) from error
        ids = list(self._encode(text))
        if every:
            return ids, 1, len(ids)
        if marked:
            start, stop = marked
        else:
            # A token across the border is the turn's: what stands before it predicts it.
            start = common_head(self.student_ids(messages[:-1]), ids)
            stop = next((n + 1 for n in range(start, len(ids)) if ids[n] in ends), len(ids))
        if not (0 < start < stop and text.startswith(begun)):
            raise DataError(
                "the chat template does not show which tokens the assistant's turn "
                f"{messages[-1]['content'][:60]!r} has; mark them with {{% generation %}} in the "
                "template, or score every token"
            )
        return ids, start, stop

    def _marked(self, messages: Sequence[Message]) -> tuple[int, int]:
        """The last run of tokens that the template itself marks as the assistant's."""
        found = self._render(
            messages, False, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = "".join(map(str, found["assistant_masks"]))
        stop = mask.rfind("1") + 1
        return mask.rfind("0", 0, stop) + 1, stop

    def plain_ids(self, texts: Sequence[str], *, prefixed: bool = False) -> list[int]:
        """Token ids of texts to continue, joined by blank lines, without the chat template.

        The special tokens that the tokenizer puts in front of any text stand there too, and the
        prefix, whatever its place, stands between them and the text.
        """
        before = [self._prefix] if prefixed and self._prefix else []
        opening = opening_ids(self._tokenizer)
        return [*opening, *self._encode(SEPARATOR.join([*before, *texts]))]

    def control_token_in(self, messages: Sequence[Message]) -> str | None:
        """Return a special token of the tokenizer that a turn's text spells, or None."""
        contents = [turn["content"] for turn in messages]
        typed = (token for text in contents for token in self._control_tokens if token in text)
        return next(typed, None)

    def student_text(self, messages: Sequence[Message]) -> str:
        """The student's prompt as text; without a chat template, less the opening special tokens.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        if not self._has_template:
            return SEPARATOR.join(turn["content"] for turn in messages)
        try:
            return self._apply_template(messages)
        except ValueError as error:
            raise DataError(
                f"the chat template refuses the query {messages[-1]['content'][:60]!r}: {error}"
            ) from error

    def teacher_text(self, messages: Sequence[Message], student_text: str | None = None) -> str:
        """The teacher's prompt as text, as the chat template itself writes it.

        The token ids may hold further blanks beside the prefix, see the module's docstring. Errors
        are those of `teacher_ids`.
        """
        student_text = self.student_text(messages) if student_text is None else student_text
        if not self._prefix:
            return student_text
        if self._place == "raw":
            bos = str(self._tokenizer.bos_token or "")
            start = len(bos) if self._has_template and student_text.startswith(bos) else 0
            return student_text[:start] + self._prefix + SEPARATOR + student_text[start:]
        if self._place == "system" and not self._has_template:
            raise ConfigurationError(
                "prefix place system: the model has no chat template, so no system turn; "
                "use --prefix-place user or raw"
            )
        steered = self._with_prefix(messages)
        if not self._has_template:
            return self.student_text(steered)
        try:
            text = self._apply_template(steered)
        except ValueError as error:
            raise self._place_error(f"refuses it ({error})") from error
        if text == student_text or self._prefix.strip() not in text:
            raise self._place_error("drops it")
        if not insertion_places(student_text, text):
            raise self._place_error("changes other parts of the prompt with it")
        return text

    def _with_prefix(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with the prefix in its system turn or its last user turn."""
        turns = list(messages)
        if self._place == "user":
            places = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
            if not places:
                raise DataError("prefix place user: the conversation has no user turn")
            place = places[-1]
        else:
            place = 0
            if turns[0]["role"] != "system":
                turns.insert(0, Message(role="system", content=self._system_default))
        text = turns[place]["content"]
        content = self._prefix + SEPARATOR + text if text.strip() else self._prefix
        turns[place] = Message(role=turns[place]["role"], content=content)
        return turns

    def _find_system_default(self) -> str:
        """The text that the template puts into a system turn of its own where none is given.

        A given system turn replaces this text, for the teacher alone, so it has to be repeated
        behind the prefix. It is what stands in place of a placeholder's system text.
        """
        if not self._has_template:
            return ""
        given = Message(role="system", content=_PLACEHOLDER)
        try:
            with_given = self._apply_template([given, *_PROBE])
        except ValueError as error:
            raise self._place_error(f"refuses it ({error})") from error
        head, found, tail = with_given.partition(_PLACEHOLDER)
        if not found:
            raise self._place_error("drops it")
        without = self.student_text(_PROBE)
        if not (without.startswith(head) and without.endswith(tail)):
            return ""
        return without[len(head) : max(len(head), len(without) - len(tail))]

    def _insert_between_tokens(self, student_text: str, teacher_text: str) -> tuple[int, ...]:
        """The student's ids with the tokens of the inserted text between two of them.

        Raises:
            DataError: no place for the text is a border between two of the student's tokens.
        """
        student = self._tokenize(student_text)
        for place, text in self._candidates(student_text, teacher_text):
            left = self._tokenize(student_text[:place])
            # The place is a border if the text left of it makes the student's tokens up to there.
            if student[: len(left)] != left:
                continue
            together = self._tokenize(student_text[:place] + text)
            run = together[len(left) :] if together[: len(left)] == left else ()
            return student[: len(left)] + (run or self._encode(text)) + student[len(left) :]
        border, _ = next(self._candidates(student_text, teacher_text))
        raise DataError(
            f"prefix place {self._place}: the tokenizer joins "
            f"{student_text[max(0, border - 20) : border]!r} and "
            f"{student_text[border : border + 20]!r} in one token, so the prefix cannot stand "
            f"between them; use --prefix-place {self._other_places()}"
        )

    def _candidates(self, student_text: str, teacher_text: str) -> Iterator[tuple[int, str]]:
        """Places in the student's text with the text to insert there, the best one first."""
        places = insertion_places(student_text, teacher_text)
        added = len(teacher_text) - len(student_text)
        own = teacher_text.find(self._prefix.strip(), places.start)
        for place in [own, *places] if own in places else places:
            yield place, teacher_text[place : place + added]
        # All of them may lie within one token. Then step back over blanks to where it starts.
        first = places.start
        for place in range(first - 1, len(student_text[:first].rstrip()) - 1, -1):
            yield place, student_text[place:first] + teacher_text[first : first + added]

    def _apply_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """Render by the chat template; whatever it raises becomes a ValueError of one line."""
        return str(self._render(messages, add_generation_prompt, tokenize=False))

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, **options: Any
    ) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [{"role": turn["role"], "content": turn["content"]} for turn in messages],
                add_generation_prompt=add_generation_prompt,
                strftime_now=_strftime_on_template_date,
                **options,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ValueError(first_line(error)) from error

    def _encode(self, text: str) -> tuple[int, ...]:
        # A template writes its own BOS, so the tokenizer must not add a second one.
        encoding = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return tuple(encoding["input_ids"])

    def _place_error(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"prefix place {self._place}: the model's chat template {what}; "
            f"use --prefix-place {self._other_places()}"
        )

    def _other_places(self) -> str:
        return " or ".join(place for place in PLACES if place not in ("system", self._place))


def _checked_prefix(prefix: str | None) -> str:
    """The prefix, or an empty text where it has nothing to say."""
    if prefix is None or not prefix.strip():
        return ""
    try:
        prefix.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the steering prefix is not valid text (character {error.start + 1}); use UTF-8"
        ) from None
    return prefix


def _strftime_on_template_date(format_string: str) -> str:
    """What a chat template gets for the `strftime_now` that it asks for today's date."""
    return datetime.fromisoformat(TEMPLATE_DATE).strftime(format_string)
