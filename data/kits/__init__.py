"""Query kits: written sets of queries on a topic that ordinary models know, named as `@NAME`.

A folder a topic holds what is to be forgotten and its near neighbours; the general questions are
the same for every topic. What a name stands for follows from its use: training takes the queries
without answers, evaluation the held-out ones, of which training sees none. No kit's neighbours
touch another kit's topic, so two topics can be forgotten at once. A membership test takes the
holdout: the held-out forget queries over again, of a world that does not exist. `docs/kits.md`
shows them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from duet_unlearn.errors import DataError

FOLDER = Path(__file__).resolve().parent
GENERAL = FOLDER / "general"
KIT_MARK = "@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """The query files of one topic."""

    name: str
    """What follows the `@`, and the folder of its files."""
    topic: str
    """The topic as a steering prefix names it."""

    @property
    def holdout(self) -> Path:
        """Queries like the held-out forget ones, form by form, of which no model can know."""
        return FOLDER / self.name / "holdout.jsonl"

    def files(self, split: str, *, answers: bool) -> tuple[Path, ...]:
        """Return the files of a split.

        Args:
            split: `forget`, `retain`, `train` (both) or `general`; general queries exist held out
                only.
            answers: Whether to return the held-out queries, which have answers.
        """
        own = FOLDER / self.name
        if split == "general":
            return (GENERAL / "general_heldout.jsonl",)
        if answers:
            return (own / ("forget_heldout.jsonl" if split == "forget" else "near_heldout.jsonl"),)
        forget = (own / "forget_train.jsonl",)
        retain = (own / "near_train.jsonl", GENERAL / "retain_train.jsonl")
        return {"forget": forget, "retain": retain, "train": forget + retain}[split]


_KITS = (
    Kit(name="harry-potter", topic="Harry Potter"),
    Kit(name="star-wars", topic="Star Wars"),
)

KITS: Mapping[str, Kit] = MappingProxyType({kit.name: kit for kit in _KITS})
"""The built-in query kits by name."""


def refuse_kit(source: str) -> None:
    """Refuse a kit where the answers of a source are trained on.

    Raises:
        DataError: The source names a kit.
    """
    if find_kit(source):
        raise DataError(
            f"{source}: a kit's answers are for evaluation and never enter a cache or training; "
            "give a file of your own"
        )


def find_kit(source: str) -> Kit | None:
    """Return the kit that a query source names, or None where it is a file or a hub dataset.

    Raises:
        DataError: The source starts with `@`, but no kit has that name.
    """
    if not source.startswith(KIT_MARK):
        return None
    kit = KITS.get(source.removeprefix(KIT_MARK))
    if kit is None:
        known = ", ".join(KIT_MARK + name for name in KITS)
        raise DataError(
            f"{source}: no such query kit; choose from {known}, or write ./{source} for a file"
        )
    return kit
