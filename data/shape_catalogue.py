"""The built-in shapes, read from shapes.toml: views for training, attacks by family."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from duet_unlearn.data.shapes import Shape
from duet_unlearn.errors import ConfigurationError

FAMILY_MARK = "family:"
_TABLES: list[Mapping[str, Shape]] = [
    MappingProxyType({name: Shape(name=name, **entry) for name, entry in table.items()})
    for table in tomllib.loads(
        Path(__file__).with_name("shapes.toml").read_text(encoding="utf-8")
    ).values()
]
VIEWS, VIEW_SHAPES, ATTACKS, SHAPED_ATTACKS = _TABLES
GROUPS: Mapping[str, tuple[Shape, ...]] = MappingProxyType(
    {
        "views": tuple(VIEWS.values()),
        "view-shapes": tuple(VIEW_SHAPES.values()),
        "attacks": tuple(ATTACKS.values()),
        "families": (*ATTACKS.values(), *SHAPED_ATTACKS.values()),
        "all": (*VIEWS.values(), *ATTACKS.values()),
    }
)
"""What `@views`, `@attacks` and so on stand for; `@families` are all attacks of every family."""


def shape_of(text: str) -> Shape:
    """Return the shape of a text, under its built-in name where it has one."""
    for table in _TABLES:
        for shape in table.values():
            if shape.text == text:
                return shape
    return Shape(name=text[:40], text=text)


def families() -> dict[str, tuple[Shape, ...]]:
    """Return the built-in attacks by family."""
    found: dict[str, tuple[Shape, ...]] = {}
    for shape in GROUPS["families"]:
        found[shape.family] = (*found.get(shape.family, ()), shape)
    return found


def built_in_shapes(name: str) -> tuple[Shape, ...]:
    """Return what `@name` stands for: a group, a shape, or `family:NAME`.

    Raises:
        ConfigurationError: There is no such name.
    """
    if name.startswith(FAMILY_MARK):
        by_family = families()
        family = name.removeprefix(FAMILY_MARK)
        if family not in by_family:
            raise ConfigurationError(
                f"shape @{name}: no such family; choose from {', '.join(by_family)}"
            )
        return by_family[family]
    if name in GROUPS:
        return GROUPS[name]
    for table in _TABLES:
        if name in table:
            return (table[name],)
    known = ", ".join(f"@{known}" for table in (GROUPS, *_TABLES) for known in table)
    raise ConfigurationError(
        f"shape @{name}: no such built-in shape; choose from {known}, @{FAMILY_MARK}NAME, or give "
        "a text file"
    )
