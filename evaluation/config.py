"""Settings of an evaluation and of one question, checked when they are made."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duet_unlearn.data.models.loading import Dtype
from duet_unlearn.data.models.quantization import SCHEMES
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.prompts import Place
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.measures import MEASURES, select_measures
from duet_unlearn.evaluation.requirements import parse_requirements
from duet_unlearn.settings import Count, Settings, setting, settings

GONE = (
    "Queries with answers that should be gone: JSONL, CSV, Parquet, a kit such as @harry-potter, "
    "or hub:NAME[:CONFIG][:SPLIT]."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model to evaluate and what the table calls it."""

    label: str
    model: str
    """A folder or a hub id."""
    seed_of: str | None = None
    """The name that it shares with models of other seeds; None where it has one of its own."""

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


def parse_models(words: Sequence[str]) -> tuple[ModelSpec, ...]:
    """Return the models of a command line.

    A name given to several models makes them seeds of one method: the first is `NAME #1`.

    Raises:
        ConfigurationError: A word is no model, or one model is given twice under a name.
    """
    specs = [ModelSpec.parse(text) for text in words]
    # Folders of one name are no seeds: somebody forgot to name them.
    unnamed = {s.label for s, text in zip(specs, words, strict=True) if s.model == text.strip()}
    found: list[ModelSpec] = []
    for spec in specs:
        seeds = [other.model for other in found if other.seed_of == spec.label]
        if spec.model in seeds:
            raise ConfigurationError(
                f"{spec.label}={spec.model} is given twice; several models of one name are seeds, "
                "so each is another one"
            )
        if spec.label not in unnamed and [s.label for s in specs].count(spec.label) > 1:
            numbered = f"{spec.label} #{len(seeds) + 1}"
            spec = dataclasses.replace(spec, label=numbered, seed_of=spec.label)
        found.append(spec)
    return tuple(found)


def refuse_empty(config: Settings, *names: str) -> None:
    """Refuse settings of which one holds nothing.

    Raises:
        ConfigurationError: It does not.
    """
    for name in names:
        if not getattr(config, name):
            raise ConfigurationError(f"{name} is empty, expected at least one")


def refuse_same_labels(labels: Sequence[str]) -> None:
    """Refuse rows that nothing tells apart.

    Raises:
        ConfigurationError: Two have one label.
    """
    for label, count in Counter(labels).items():
        if count > 1:
            raise ConfigurationError(
                f"{count} rows would be called {label!r}; name the models with NAME=MODEL"
            )


@settings
class SubjectsConfig(Settings):
    """Which models are looked at, the first of them behind a prefix as well."""

    models: tuple[ModelSpec, ...] = setting(
        flag=None, help="Models side by side; the first is the reference of all differences."
    )
    prefix: str | None = setting(
        default=None,
        group="How to ask",
        metavar="TEXT|@NAME",
        help="Steering prefix: adds a row for the first MODEL with it.",
    )
    topic: str | None = setting(default=None, help="What fills {topic} in the prefix.")
    prefix_place: Place = setting(default="system", help="Where the prefix stands.")
    dtype: Dtype = setting(
        default="auto",
        help="Dtype to compute in; auto is the stored one where the hardware is fast in it, else "
        "float32.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        refuse_empty(self, "models")
        if self.prefix is None and (self.topic is not None or not self.is_default("prefix_place")):
            name = "prefix_place" if self.topic is None else "topic"
            raise ConfigurationError(f"{name} is set without a prefix; give --prefix as well")
        several = [line for line, rows in self.lines.items() if len(set(rows)) > 1]
        refuse_same_labels([*self.labels, *several])

    @property
    def resolved_prefix(self) -> str | None:
        """The prefix's text, the topic in it; raises as `resolve_prefix` does."""
        return None if self.prefix is None else resolve_prefix(self.prefix, self.topic)

    @property
    def prefixed_label(self) -> str | None:
        """What the row of the first model with the steering prefix is called, if there is one."""
        return None if self.prefix is None else f"{self.models[0].label} + prefix"

    def rows_of(self, spec: ModelSpec) -> tuple[str, ...]:
        """The rows of one model: its own, the first one's behind the prefix, the quantized."""
        prefixed = self.prefixed_label if spec is self.models[0] else None
        plain = (spec.label,) if prefixed is None else (spec.label, prefixed)
        return (*plain, *self.quantized_rows(spec))

    def quantized_rows(self, spec: ModelSpec) -> dict[str, str]:  # noqa: ARG002
        """The rows of one model with rounded weights, each with its scheme."""
        return {}

    @property
    def labels(self) -> tuple[str, ...]:
        """The rows in order."""
        return tuple(label for spec in self.models for label in self.rows_of(spec))

    @property
    def lines(self) -> dict[str, tuple[str, ...]]:
        """The lines of a table in order, each with its rows: one for each seed of its name."""
        lines: dict[str, tuple[str, ...]] = {}
        for spec in self.models:
            for label in self.rows_of(spec):
                line = (spec.seed_of or spec.label) + label.removeprefix(spec.label)
                lines[line] = (*lines.get(line, ()), label)
        return lines


@settings
class AskConfig(SubjectsConfig):
    """Settings of `duet-distill ask`: who is asked, and how."""

    attacks: tuple[str, ...] = setting(
        default=(),
        metavar="FILE|@NAME",
        help="Also ask in each of these shapes: a text file, one per line with {query} in it, a "
        "built-in name, @family:NAME, @attacks or @families, or for eval a query file with a "
        "column `asked`. Repeatable.",
    )
    max_new_tokens: Count = setting(default=64, help="Longest generated answer, in tokens.")
    quantize: tuple[str, ...] = setting(
        default=(),
        metavar="int8|int4",
        help="Also ask each model with its weights rounded, in a row of its own; needs "
        "duet-unlearn[quantize]. Repeatable.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        for scheme in self.quantize:
            if scheme not in SCHEMES:
                raise ConfigurationError(f"quantize is {scheme!r}, expected {' or '.join(SCHEMES)}")
        SubjectsConfig.__post_init__(self)

    def quantized_rows(self, spec: ModelSpec) -> dict[str, str]:
        """The rows of one model with rounded weights, each with its scheme."""
        return {f"{spec.label} {scheme}": scheme for scheme in dict.fromkeys(self.quantize)}


@settings
class EvalConfig(AskConfig):
    """Settings of `duet-distill eval`."""

    forget: tuple[str, ...] = setting(
        group="What to ask",
        metavar="FILE",
        help=f"{GONE} A column `kind` is scored apart. Repeatable.",
    )
    retain: tuple[str, ...] = setting(
        metavar="FILE", help="Queries with answers that should be kept. Repeatable."
    )
    general: tuple[str, ...] = setting(
        default=(), metavar="FILE", help="Queries with answers on anything else. Repeatable."
    )
    answers: Literal["file", "base"] = setting(
        default="file",
        help="What is right: the answers in the query files, or, where there are none, what the "
        "first MODEL says to the plain query.",
    )
    limit: Count | None = setting(
        default=None, help="Take this many queries of each file, evenly spread.  [default: all]"
    )
    batch_size: Count = setting(default=64, help="Largest batch, in queries.")
    measures: tuple[str, ...] = setting(
        default=(),
        group="What to show",
        flag="--measure",
        metavar="NAME",
        help=f"Also show this measure: {', '.join(MEASURES)}. Repeatable.",
    )
    samples: Count = setting(
        default=8,
        help="Answers sampled per query at temperature 1 where sampled_recall is measured.",
    )
    lm_eval: tuple[str, ...] = setting(
        default=(),
        metavar="TASK",
        help="Also run this task of lm-eval (mmlu, wmdp, ...) on each model; needs "
        "duet-unlearn[lm-eval]. Repeatable.",
    )
    lm_eval_path: str | None = setting(
        default=None, metavar="DIR", help="Folder with further task files for lm-eval."
    )
    refusals: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        help="Further phrases that mark a refusal, one per line. Repeatable.",
    )
    require: str | None = setting(
        default=None,
        metavar="BOUNDS",
        help='Exit 1 where these do not hold, in points: "forget<5,worst<10,retain>97". NAME: or '
        ".MEASURE may stand around a name. Every seed is held to them.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        AskConfig.__post_init__(self)
        if (name := self.models[0].seed_of) is not None:
            raise ConfigurationError(
                f"the first model is the reference, and {name!r} is several; put the base first"
            )
        refuse_empty(self, "forget", "retain")
        if self.lm_eval_path is not None and not self.lm_eval:
            raise ConfigurationError("lm_eval_path is set without a task; give --lm-eval as well")
        if not self.is_default("samples") and "sampled_recall" not in self.measures:
            raise ConfigurationError(
                "samples is set, but nothing is sampled; give --measure sampled_recall as well"
            )
        select_measures(self.measures)
        for part in parse_requirements(self.require) if self.require else ():
            if MEASURES[part.measure].needs != "text" and part.measure not in self.measures:
                raise ConfigurationError(
                    f"--require {part.text}: give --measure {part.measure} as well"
                )
            if part.row and part.row not in (*self.lines, *self.labels):
                raise ConfigurationError(
                    f"--require {part.text}: no row {part.row!r}; there are "
                    f"{', '.join(self.labels)}"
                )
            if part.what.startswith("worst") and not self.attacks:
                raise ConfigurationError(f"--require {part.text}: give --attacks as well")

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Split and source of every query set, in the order of the table's columns."""
        splits = {"forget": self.forget, "retain": self.retain, "general": self.general}
        return tuple((split, source) for split, sources in splits.items() for source in sources)
