"""What an evaluation is told: one frozen dataclass, checked when it is made."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.loading import DTYPES
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.measures import MEASURES
from duet_unlearn.evaluation.requirements import parse_requirements


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model to evaluate and what the table calls it."""

    label: str
    model: str
    """A folder or a hub id."""

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Return the model of `MODEL` or `NAME=MODEL`; without a name it has its folder's.

        Raises:
            ConfigurationError: name or model is empty.
        """
        label, equals, model = text.partition("=")
        if not equals or Path(text).exists():  # an equals sign may stand in a folder's name
            label, model = Path(text).name or Path(text).resolve().name, text
        if not label.strip() or not model.strip():
            raise ConfigurationError(f"model {text!r}: expected MODEL or NAME=MODEL")
        return cls(label=label.strip(), model=model.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Settings of `duet-distill eval`."""

    models: tuple[ModelSpec, ...]
    """Models side by side; the first is the reference of all differences."""
    forget: tuple[str, ...]
    """Query sources with answers that the models should no longer give."""
    retain: tuple[str, ...]
    """Query sources with answers that they should still give."""
    general: tuple[str, ...] = ()
    """Query sources on what has nothing to do with either."""
    prefix: str | None = None
    """Steering prefix, as text or `@NAME`: adds the first model with this prefix as a row."""
    topic: str | None = None
    """What fills the prefix's `{topic}`."""
    prefix_place: str = "system"
    """`system`, `user` or `raw`."""
    attacks: tuple[str, ...] = ()
    """Shape files or `@NAME`s: forget and retain queries are also asked behind each of them."""
    measures: tuple[str, ...] = ()
    """Measures of `duet_unlearn.evaluation.measures` that are shown as well; those on likelihood
    are only taken where they are named."""
    refusals: tuple[str, ...] = ()
    """Files of further phrases that mark a refusal."""
    require: str | None = None
    """Bounds that the result has to keep, as `forget<5,worst<10,retain>97`."""
    batch_size: int = 64
    """Most queries of a forward pass."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""
    dtype: str = "auto"
    """Arithmetic: `auto` is as stored where the processor has that fast, else float32."""
    limit: int | None = None
    """Evaluate this many queries of each source, evenly spread over it; None takes all."""

    def __post_init__(self) -> None:
        for name in ("models", "forget", "retain"):
            if not getattr(self, name):
                raise ConfigurationError(f"{name} is empty, expected at least one")
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}, expected 1 or more")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"dtype is {self.dtype!r}, expected {', '.join(DTYPES)}")
        if self.topic is not None and self.prefix is None:
            raise ConfigurationError("topic is set without a prefix; give --prefix as well")
        for part in parse_requirements(self.require) if self.require else ():
            if MEASURES[part.measure].likelihood and part.measure not in self.measures:
                raise ConfigurationError(
                    f"--require {part.text}: give --measure {part.measure} as well"
                )
            if part.what.startswith("worst") and not self.attacks:
                raise ConfigurationError(f"--require {part.text}: give --attacks as well")
        for label, count in Counter(self.labels).items():
            if count > 1:
                raise ConfigurationError(
                    f"{count} rows would be called {label!r}; name the models with NAME=MODEL"
                )

    @property
    def prefixed_label(self) -> str | None:
        """What the row of the first model with the steering prefix is called, if there is one."""
        return None if self.prefix is None else f"{self.models[0].label} + prefix"

    @property
    def labels(self) -> tuple[str, ...]:
        """The rows of the table in order."""
        prefixed = () if self.prefixed_label is None else (self.prefixed_label,)
        first, *others = (spec.label for spec in self.models)
        return (first, *prefixed, *others)

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Split and source of every query set, in the order of the table's columns."""
        splits = {"forget": self.forget, "retain": self.retain, "general": self.general}
        return tuple((split, source) for split, sources in splits.items() for source in sources)

    def to_json(self) -> dict[str, Any]:
        """Return every setting as JSON values."""
        return dataclasses.asdict(self)
