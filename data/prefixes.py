"""Steering prefixes: the instructions that make a base model act as the teacher.

A steering prefix is plain text; where it stands in the prompt is the renderer's matter. The
catalogue holds wordings that cover what people compare: two ways to name the topic, the style of
the in-context-unlearning literature, and two controls (a prefix that refuses everything and one
that has nothing to do with the topic).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from duet_unlearn.errors import ConfigurationError

TOPIC_SLOT = "{topic}"
"""Where the topic goes in a prefix. No other brace has a meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTemplate:
    """One steering prefix of the catalogue."""

    name: str
    """What follows the `@` on the command line."""

    description: str
    """One line for help pages and model cards."""

    text: str
    """The wording, with `{topic}` wherever the topic goes."""

    @property
    def needs_topic(self) -> bool:
        """Whether the wording names a topic."""
        return TOPIC_SLOT in self.text

    def fill(self, topic: str) -> str:
        """Return the wording with `topic` in every slot.

        The topic is put in by replacement, not by `str.format`, so braces in it are kept.
        """
        return self.text.replace(TOPIC_SLOT, topic)


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
        name="refuse-everything",
        description="control: declines whatever is asked",
        text=(
            "You do not answer questions of any kind. Whatever you are asked, decline politely "
            "and give no information."
        ),
    ),
    PrefixTemplate(
        name="irrelevant",
        description="control: a system prompt that has nothing to do with the topic",
        text="You are a friendly assistant who enjoys long walks in the rain.",
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
            has a `{topic}` slot and no topic is given.
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
    if not template.needs_topic:
        return template.text
    # A literal "{topic}" in a prompt would steer towards nothing, so it never passes silently.
    if topic is None:
        raise ConfigurationError(f"{source} has a {TOPIC_SLOT} slot; fill it with --topic")
    return template.fill(topic.strip())


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
