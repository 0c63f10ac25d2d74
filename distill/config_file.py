"""A training run as one YAML file: read it, and write the one that makes the same student again.

    cache: hp-cache
    student: meta-llama/Llama-3.2-3B-Instruct
    out: hp-student
    views: ["@remember"]
    learning_rate: 1e-5

Keys are the fields of `RunConfig`. Values are read by the type of their field and not by YAML's
guess: `1e-5` is a number although YAML 1.1 calls it text, `2026-01-31` is the name of a folder.
Nothing is constructed from the file but text, numbers and lists of texts.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.files import write_text

CONFIG_FILE = "duet_run.yaml"

_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")
)
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_EXPECTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    """One entry of a file."""

    value: Any
    line: int


def load_config(
    path: str | None,
    given: Mapping[str, Any],
    *,
    needed: Callable[[list[str]], None] | None = None,
) -> RunConfig:
    """Return the settings of a file with those given beside it, which win.

    Args:
        path: The file, or None for no file. Paths in it count from the current folder, as those on
            the command line do.
        given: Settings by name.
        needed: Called with the names of the settings that are in neither although they have no
            default; without it they are a ConfigurationError.

    Raises:
        ConfigurationError: The file cannot be read, a key or value in it is wrong, or the settings
            contradict each other.
    """
    settings = {} if path is None else _read(Path(path).expanduser())
    values = {name: setting.value for name, setting in settings.items()} | dict(given)
    missing = [
        field.name
        for field in dataclasses.fields(RunConfig)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing and needed is not None:
        needed(missing)
    if missing:
        raise ConfigurationError(f"{path or 'the run'}: {missing[0]} is missing; give it")
    try:
        return RunConfig(**values)
    except ConfigurationError as error:
        name = str(error).partition(" ")[0]
        if name in settings and name not in given:
            raise ConfigurationError(f"{path}, line {settings[name].line}: {error}") from error
        raise


def write_config(folder: Path, config: RunConfig, digest: str) -> None:
    """Write `duet_run.yaml`: the resolved settings, the cache pinned by its digest.

    Args:
        folder: Of the student.
        config: What the run resolved to.
        digest: Of the cache.

    Raises:
        CacheError: The file cannot be written.
    """
    settings = config.to_json()
    del settings["overwrite"]  # a file that replaces what it finds is the user's to write
    if "@sha256:" not in config.cache:
        settings["cache"] = f"{config.cache}@{digest}"
    header = (
        "# The settings of this student, `auto` resolved where it is the same on every machine. To "
        f"train it again:\n#   duet-distill run --config {CONFIG_FILE} --out ANOTHER_FOLDER\n"
    )
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10_000)
    write_text(folder / CONFIG_FILE, header + text)


def _read(path: Path) -> dict[str, _Setting]:
    root = _parse(path)
    if root is None:
        raise ConfigurationError(f"{path}: holds no settings; write `name: value`, one a line")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ConfigurationError(
            f"{path}, line {_line(root)}: {kind}, expected settings as `name: value`"
        )
    hints = typing.get_type_hints(RunConfig)
    settings: dict[str, _Setting] = {}
    for key, value in root.value:
        where = f"{path}, line {_line(key)}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigurationError(f"{where}: {_shown(key)}, expected the name of a setting")
        name = key.value
        if name not in hints:
            raise ConfigurationError(f"{where}: {_unknown(name, list(hints))}")
        if name in settings:
            raise ConfigurationError(
                f"{where}: {name} stands in line {settings[name].line} already; give it once"
            )
        try:
            read = _value(value, hints[name])
        except ValueError:
            raise ConfigurationError(
                f"{path}, line {_line(value)}: {name} is {_shown(value)}, expected "
                f"{_expected(hints[name])}"
            ) from None
        settings[name] = _Setting(value=read, line=_line(key))
    return settings


def _parse(path: Path) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path}: no such file; expected a YAML file of settings"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigurationError(f"{path}: not readable as UTF-8 text ({reason})") from error
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        quoted = "; put a name that begins with @ in quotes" if "'@'" in str(error) else ""
        raise ConfigurationError(f"{where}: not YAML ({error.problem}){quoted}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    return node


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=3)
    if near:
        return f"no setting {name!r}; did you mean {' or '.join(near)}?"
    return f"no setting {name!r}; there are {', '.join(known)}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a field, a union taken apart."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _value(node: yaml.Node, hint: Any) -> Any:
    """Read a value by the type of its field.

    Raises:
        ValueError: It is of another type.
    """
    for alternative in _alternatives(hint):
        try:
            if typing.get_origin(alternative) is tuple:
                items = node.value if isinstance(node, yaml.SequenceNode) else [node]
                return tuple(_scalar(item, str) for item in items)
            return _scalar(node, alternative)
        except ValueError:
            continue
    raise ValueError


def _scalar(node: yaml.Node, kind: Any) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
        raise ValueError
    null = node.tag.endswith(":null")
    if null or kind is types.NoneType:
        if null and kind is types.NoneType:
            return None
        raise ValueError
    if kind is bool:
        if node.value.lower() not in (*_TRUE, *_FALSE):
            raise ValueError
        return node.value.lower() in _TRUE
    return kind(node.value)


def _expected(hint: Any) -> str:
    kinds = [typing.get_origin(kind) or kind for kind in _alternatives(hint)]
    return " or ".join(_EXPECTED[kind] for kind in kinds if kind in _EXPECTED)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "empty"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of settings"
