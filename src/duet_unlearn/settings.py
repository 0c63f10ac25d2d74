"""Settings from one source: each field says its type, bounds, default, help and flag, once.

    @settings
    class RunConfig(Settings):
        cache: str = setting(flag="CACHE", group="Where from", help="The teacher cache.")
        views: tuple[str, ...] = setting(default=(), flag="--view", help="Wrappers. Repeatable.")
        learning_rate: Positive | Literal["auto"] = setting(
            default="auto", group="How it learns", aliases=("lr",), help="Peak learning rate."
        )

makes a frozen keyword-only dataclass whose values pydantic checks: of the field's very type, a
number within its bounds (`Count`, `Positive`, ...), one of its `Literal`s. A wrong value is a
`ConfigurationError` of one line that names field, value and what is allowed; so is what
`__post_init__` raises where settings contradict each other. `cli.options.SettingsCommand` makes
the command line of such a class, `settings_file.load` reads it from YAML, `to_json` writes it.

Texts, from a flag or a file, are read by the type of their field and not by YAML's guess: `1e-5` is
a number although YAML 1.1 calls it text, `2026-01-31` is the name of a folder.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses

from duet_unlearn.errors import ConfigurationError, MissingSettingError

Count = Annotated[int, pydantic.Field(ge=1)]
"""A whole number, 1 or more."""
Whole = Annotated[int, pydantic.Field(ge=0)]
"""A whole number, 0 or more."""
Positive = Annotated[float, pydantic.Field(gt=0)]
"""A number above 0."""
NotNegative = Annotated[float, pydantic.Field(ge=0)]
"""A number, 0 or more."""
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
"""A number, 0 to 1."""

_CHECKS = pydantic.ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple: "a list of texts",
}
_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
_BOUNDS = {"ge": "{} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
T = TypeVar("T", bound="Settings")


def setting(
    *,
    help: str,  # noqa: A002 - as click calls it
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    group: str | None = None,
    flag: str | None = "",
    metavar: str | None = None,
    aliases: tuple[str, ...] = (),
    decides: bool = True,
    overrules: tuple[str, ...] = (),
) -> Any:
    """Declare a field; `Field` explains the arguments.

    A flag left out is the field's name, a group left out that of the field before.
    """
    shown: dict[str, Any] = {"help": help, "group": group, "flag": flag, "metavar": metavar}
    shown |= {"aliases": aliases, "decides": decides, "overrules": overrules}
    metadata = {"json_schema_extra": shown}  # pydantic.Field takes metadata as its arguments
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def settings(declared: type[T]) -> type[T]:
    """Make a checked, frozen dataclass of a class whose fields are `setting`s."""
    config: Any = {**_CHECKS, "strict": True, "extra": "forbid"}
    made: Any = pydantic.dataclasses.dataclass(
        frozen=True, kw_only=True, slots=True, config=config
    )(declared)
    check = made.__init__

    @functools.wraps(check)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        try:
            check(self, **values)
        except pydantic.ValidationError as error:
            raise _explain(made, values, error) from None

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


class Settings:
    """What every class of settings can do."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    __slots__ = ()

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with other values, checked anew."""
        copy: Any = dataclasses.replace(self, **changes)
        return copy  # type: ignore[no-any-return]

    def is_default(self, name: str) -> bool:
        """Say whether a setting is what it is where nobody gives it."""
        return bool(getattr(self, name) == fields(self)[name].default)

    def to_json(self) -> dict[str, Any]:
        """Return every setting as JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return found

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the result, as JSON values."""
        return {name: v for name, v in self.to_json().items() if fields(self)[name].decides}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A field of a class of settings: what it takes, and what people see of it."""

    name: str
    kind: Any
    """Its type, with bounds."""
    default: Any
    """`dataclasses.MISSING` where there is none."""
    help: str
    group: str
    """Heading of the help page that it stands under."""
    flag: str | None
    """`--name`, `--yes/--no`, `ARGUMENT`, or None for what no command line sets."""
    metavar: str | None
    aliases: tuple[str, ...]
    """Names of other tools for it: nothing takes them, but whoever tries is told the right one."""
    decides: bool
    """Whether the result depends on it; the rest may change while unfinished work resumes."""
    overrules: tuple[str, ...]
    """Further settings that do not count in a file where this one is given beside it."""

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """Its type, a union taken apart."""
        union = typing.get_origin(self.kind) in (typing.Union, types.UnionType)
        return typing.get_args(self.kind) if union else (self.kind,)

    @property
    def many(self) -> bool:
        """Whether it takes several values, or several `KEY=VALUE`s."""
        return any(_plain(kind) in (tuple, Mapping) for kind in self.alternatives)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, where it takes nothing else."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def expected(self) -> str:
        """What is allowed, in words."""
        words = [_in_words(kind) for kind in self.alternatives if kind is not type(None)]
        return (", or " if "," in words[0] else " or ").join(words)

    @property
    def placeholder(self) -> str:
        """What the help page writes for its value where no `metavar` is declared."""
        kinds = [kind for kind in self.alternatives if kind is not type(None)]
        words = [
            "|".join(typing.get_args(kind)) if _plain(kind) is Literal else _METAVARS[_plain(kind)]
            for kind in kinds
        ]
        return "|".join(reversed(words))

    def parse(self, value: Any) -> Any:
        """Return the value of a text, a list or a mapping of them.

        Raises:
            ValueError: It is none of this field's.
        """
        return pydantic.TypeAdapter(self.kind, config=_CHECKS).validate_python(value)


def fields(of: "type[Settings] | Settings") -> dict[str, Field]:
    """Return the fields of a class of settings by name, in the order of their declaration."""
    declared: Any = of if isinstance(of, type) else type(of)
    return _fields(declared)


@functools.cache
def _fields(of: Any) -> dict[str, Field]:
    hints = typing.get_type_hints(of, include_extras=True)
    found: dict[str, Field] = {}
    group = ""
    for field in of.__dataclass_fields__.values():
        shown = field.metadata["json_schema_extra"]
        group = shown["group"] or group
        flag = f"--{field.name.replace('_', '-')}" if shown["flag"] == "" else shown["flag"]
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        resolved = {**shown, "group": group, "flag": flag}
        found[field.name] = Field(
            name=field.name, kind=hints[field.name], default=default, **resolved
        )
    return found


def suggest(of: type[Settings], unknown: str) -> list[str]:
    """Return the fields that a name may mean: by their aliases, else by their spelling."""
    name = unknown.strip("-").replace("-", "_")
    known = {field.name: field.name for field in fields(of).values()}
    for field in fields(of).values():
        known |= {alias.replace("-", "_"): field.name for alias in field.aliases}
    near = [name] if name in known else difflib.get_close_matches(name, known, n=3)
    return list(dict.fromkeys(known[match] for match in near))


def unknown_setting(of: type[Settings], name: str) -> str:
    """Say that there is no such setting, and which may be meant."""
    near = " or ".join(suggest(of, name))
    hint = f"did you mean {near}?" if near else f"there are {', '.join(fields(of))}"
    return f"no setting {name!r}; {hint}"


def read_pairs(texts: Collection[str]) -> dict[str, Any]:
    """Read `KEY=VALUE`s: JSON where a value is some, such as `2` and `true`, else text.

    Raises:
        ValueError: A text is no such pair, or a key is given twice.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")  # as other command lines spell it
        if not equals or not key.isidentifier():
            raise ValueError(f"{text!r}: expected KEY=VALUE")
        if key in pairs:
            raise ValueError(f"{key} is given twice")
        pairs[key] = json_or_text(value)
    return pairs


def json_or_text(text: str) -> Any:
    """Return what a text is as JSON, else the text."""
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


def _explain(
    of: type[Settings], values: Mapping[str, Any], error: pydantic.ValidationError
) -> ConfigurationError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return MissingSettingError(f"{name} is missing; give it", setting=name)
    if name not in fields(of):
        return ConfigurationError(unknown_setting(of, name))
    return ConfigurationError(f"{name} is {values[name]!r}, expected {fields(of)[name].expected}")


def _plain(kind: Any) -> Any:
    """Return a type without bounds and parameters."""
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    origin = typing.get_origin(bare) or bare
    return Mapping if isinstance(origin, type) and issubclass(origin, Mapping) else origin


def _in_words(kind: Any) -> str:
    plain = _plain(kind)
    if plain is Literal:
        choices = typing.get_args(kind)
        return ("one of " if len(choices) > 1 else "") + ", ".join(choices)
    if plain is Mapping:
        return "names with their values"
    bounds = {
        name: f"{getattr(limit, name):g}"
        for constraint in typing.get_args(kind)[1:]
        for limit in getattr(constraint, "metadata", ())
        for name in _BOUNDS
        if hasattr(limit, name)
    }
    if {"ge", "le"} <= bounds.keys():
        limits = [f"{bounds['ge']} to {bounds['le']}"]
    else:
        limits = [_BOUNDS[name].format(bound) for name, bound in bounds.items()]
    words = _KINDS.get(plain) or str(getattr(plain, "__name__", plain))
    return ", ".join([words, *([" and ".join(limits)] if limits else [])])
