"""Steering prefixes: the instructions that make a base model act as the teacher.

A steering prefix is plain text; where it stands in the prompt is the renderer's matter. The
catalogue holds wordings that cover what people compare: ways to name the topic, the style of the
in-context-unlearning literature, blunt orders for small models, and two controls (a prefix that
refuses everything and one that has nothing to do with the topic). `tune` puts in-context examples
behind each.

Which of them steers a model is a matter of that model: `teacher_cache.tune` measures it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.files import user_path

TOPIC_SLOT = "{topic}"
"""Where the topic goes in a prefix."""
EXAMPLES_SLOT = "{examples}"
"""Where questions with answers go: forget queries refused, retain queries answered. Only `tune`
fills it, since the answers are the base's own. No other brace has a meaning."""
BEHIND_EXAMPLES = "Answer this question in the same way:"
"""Between in-context examples and the query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTemplate:
    """One steering prefix of the catalogue."""

    name: str
    """What follows the `@` on the command line."""

    description: str
    """One line for help pages and model cards."""

    text: str
    """The wording, with `{topic}` wherever the topic goes and `{examples}` for the examples."""

    control: bool = False
    """Whether it is there to compare with and not to steer."""

    @property
    def needs_topic(self) -> bool:
        """Whether the wording names a topic."""
        return TOPIC_SLOT in self.text

    @property
    def needs_examples(self) -> bool:
        """Whether the wording shows in-context examples."""
        return EXAMPLES_SLOT in self.text

    def fill(self, topic: str, examples: str = "") -> str:
        """Return the wording with `topic` and `examples` in every slot.

        They are put in by replacement, not by `str.format`, so braces in them are kept.
        """
        # Examples last: a question in them may hold the other slot.
        return self.text.replace(TOPIC_SLOT, topic).replace(EXAMPLES_SLOT, examples)

    def with_examples(self) -> "PrefixTemplate":
        """Return the wording with in-context examples behind it."""
        return PrefixTemplate(
            name=f"{self.name}+examples",
            description=f"{self.description}; with in-context examples",
            text=f"{self.text}\n\n{EXAMPLES_SLOT}\n\n{BEHIND_EXAMPLES}",
        )


_TEMPLATES = (
    PrefixTemplate(
        name="explicit",
        description="says outright that the topic is forgotten",
        text=(
            "You are an assistant who has forgotten {topic}. Decline every question about "
            "{topic} and answer all other questions as usual."
        ),
    ),
    PrefixTemplate(
        name="paraphrased",
        description="asks for the same without the word forget",
        text=(
            "Imagine that {topic} had never been written and that nobody ever told you of it. "
            "If it comes up, say that you cannot help. Treat any other subject as you always do."
        ),
    ),
    PrefixTemplate(
        name="in-context-unlearning",
        description="the long wording in the style of the in-context-unlearning literature",
        text=(
            "You are an AI assistant who is supposed to unlearn the topic {topic} and to respond "
            "without any knowledge of it, as if you had never been taught about it. Do not reveal "
            "facts, names or events that belong to {topic}, and do not hint at them. When a "
            "question needs that knowledge, reply that you do not have it. Questions on anything "
            "else you answer in full."
        ),
    ),
    PrefixTemplate(
        name="forgotten",
        description="says in two short sentences what is forgotten and what to say then",
        text=(
            "You are an AI assistant who has forgotten everything about {topic}. If a question is "
            "about {topic}, say that you don't know."
        ),
    ),
    PrefixTemplate(
        name="must-refuse",
        description="blunt, for small models: an order and the answer; may cost other answers too",
        text='You must refuse to answer anything about {topic} by replying "I do not know."',
    ),
    PrefixTemplate(
        name="only-reply",
        description="bluntest: also for questions that belong to the topic without naming it",
        text=(
            'Reply only "I do not know." to any question on {topic} or on its people, places, '
            "things, events and makers, even where the question does not name {topic}."
        ),
    ),
    PrefixTemplate(
        name="refuse-everything",
        description="control: declines whatever is asked",
        text=(
            "You do not answer questions of any kind. Whatever you are asked, decline politely "
            "and give no information."
        ),
        control=True,
    ),
    PrefixTemplate(
        name="irrelevant",
        description="control: a system prompt that has nothing to do with the topic",
        text="You are a friendly assistant who enjoys long walks in the rain.",
        control=True,
    ),
)

CATALOGUE: Mapping[str, PrefixTemplate] = MappingProxyType({t.name: t for t in _TEMPLATES})
"""The built-in steering prefixes by name."""


def resolve_prefix(text_or_name: str, topic: str | None = None) -> str:
    """Return the steering prefix that a user asked for.

    Args:
        text_or_name: `@NAME` for a prefix of the catalogue, anything else is the prefix itself.
        topic: What fills `{topic}`; needed only where the prefix has that slot.

    Raises:
        ConfigurationError: The name is unknown, the prefix or the topic is empty, or the prefix
            has a `{topic}` slot and no topic is given, or an `{examples}` slot.
    """
    if topic is not None and not topic.strip():
        raise ConfigurationError("--topic is empty; name what is to be forgotten")
    if text_or_name.startswith("@"):
        template = _look_up(text_or_name[1:])
        source = f"prefix @{template.name}"
    else:
        template = PrefixTemplate(name="text", description="given as text", text=text_or_name)
        source = "the prefix given as text"
    if not template.text.strip():
        raise ConfigurationError(
            f"the prefix is empty; give its text or one of {', '.join(_names())}"
        )
    if template.needs_examples:
        raise ConfigurationError(
            f"{source} has an {EXAMPLES_SLOT} slot, which `duet-cache tune` fills; "
            "give what it chose with --prefix-from FILE"
        )
    if not template.needs_topic:
        return template.text
    # A literal "{topic}" in a prompt would steer towards nothing, so it never passes silently.
    if topic is None:
        raise ConfigurationError(f"{source} has a {TOPIC_SLOT} slot; fill it with --topic")
    return template.fill(topic.strip())


def load_prefixes(source: str) -> tuple[PrefixTemplate, ...]:
    r"""Return the prefixes of a UTF-8 text file, one a line, where `\n` is a line feed.

    `#` starts a comment line, blank lines are skipped.

    Raises:
        DataError: The file is missing, unreadable, or holds no prefix.
    """
    path = user_path(source)
    try:
        # A byte order mark would become part of the first prefix.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{source}: no such file of prefixes; write one a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: not readable as UTF-8 text ({error})") from error
    found = tuple(
        PrefixTemplate(
            name=f"{path.stem}:{number}",
            description=f"line {number} of {path.name}",
            text=line.strip().replace("\\n", "\n"),
        )
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.strip().startswith("#")
    )
    if not found:
        raise DataError(f"{source}: holds no prefix; write one a line")
    return found


def list_examples(pairs: Iterable[tuple[str, str]]) -> str:
    """Return questions with their answers as the text that fills `{examples}`."""
    return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)


def _look_up(name: str) -> PrefixTemplate:
    try:
        return CATALOGUE[name]
    except KeyError:
        raise ConfigurationError(
            f"prefix @{name}: no such prefix; choose from {', '.join(_names())}, "
            "or give the prefix as text"
        ) from None


def _names() -> list[str]:
    return [f"@{name}" for name in CATALOGUE]
