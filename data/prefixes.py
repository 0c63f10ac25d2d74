"""Steering prefixes: the instructions that make a base model act as the teacher.

A steering prefix is plain text; where it stands in the prompt is the renderer's matter. The
catalogue holds wordings that cover what people compare: ways to name the topic, the style of the
in-context-unlearning literature, blunt orders for small models, and two controls (a prefix that
refuses everything and one that has nothing to do with the topic). `tune` puts in-context examples
behind each.

Which of them steers a model is a matter of that model: `teacher_cache.tune` measures it.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.files import read_entries, user_path

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


CATALOGUE: Mapping[str, PrefixTemplate] = MappingProxyType(
    {
        name: PrefixTemplate(name=name, **entry)
        for name, entry in tomllib.loads(
            Path(__file__).with_name("prefixes.toml").read_text(encoding="utf-8")
        ).items()
    }
)
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
    source, text = "the prefix given as text", text_or_name
    if text_or_name.startswith("@"):
        source = f"prefix {text_or_name}"
        if text_or_name[1:] not in CATALOGUE:
            known = ", ".join(f"@{name}" for name in CATALOGUE)
            raise ConfigurationError(
                f"{source}: no such prefix; choose from {known}, or give the prefix as text"
            )
        text = CATALOGUE[text_or_name[1:]].text
    if not text.strip():
        raise ConfigurationError(
            "the prefix is empty; give its text or the @NAME of a built-in one"
        )
    if EXAMPLES_SLOT in text:
        raise ConfigurationError(
            f"{source} has an {EXAMPLES_SLOT} slot, which `duet-cache tune` fills; "
            "give what it chose with --prefix-from FILE"
        )
    if TOPIC_SLOT not in text:
        if odd := re.search(r"\{\s*topic\s*\}", text, re.IGNORECASE):
            raise ConfigurationError(f"{source} has {odd[0]} in it; the slot is {TOPIC_SLOT}")
        return text
    # A literal "{topic}" in a prompt would steer towards nothing, so it never passes silently.
    if topic is None:
        raise ConfigurationError(f"{source} has a {TOPIC_SLOT} slot; fill it with --topic")
    return text.replace(TOPIC_SLOT, topic.strip())


def load_prefixes(source: str) -> tuple[PrefixTemplate, ...]:
    r"""Return the prefixes of a UTF-8 text file, one a line, where `\n` is a line feed.

    `#` starts a comment line, blank lines are skipped.

    Raises:
        DataError: The file is missing, unreadable, or holds no prefix.
    """
    path = user_path(source)
    found = tuple(
        PrefixTemplate(
            name=f"{path.stem}:{number}",
            description=f"line {number} of {path.name}",
            text=line.replace("\\n", "\n"),
        )
        for number, line in read_entries(source, "file of prefixes; write one a line")
    )
    if not found:
        raise DataError(f"{source}: holds no prefix; write one a line")
    return found


def list_examples(pairs: Iterable[tuple[str, str]]) -> str:
    """Return questions with their answers as the text that fills `{examples}`."""
    return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)
