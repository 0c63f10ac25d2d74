"""Read settings from a YAML file: text, numbers, lists and names with values, nothing else.

A wrong key or value ends in one line that says the file's line, what stands there and what is
expected. Nothing is constructed from the file's tags.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import yaml

from duet_unlearn.errors import ConfigurationError, MissingSettingError, first_line
from duet_unlearn.files import read_text
from duet_unlearn.settings import Field, Settings, fields, json_or_text, unknown_setting

T = TypeVar("T", bound=Settings)
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
)


def load(of: type[T], path: str | None, given: Mapping[str, Any]) -> T:
    """Return the settings of a YAML file with those given beside it, which win.

    Paths in it count from the current folder, as those on the command line do.

    Raises:
        ConfigurationError: The file cannot be read, a key or value in it is wrong, or the settings
            contradict each other.
        MissingSettingError: A setting without default is in neither.
    """
    overruled = {name for key in given if key in fields(of) for name in fields(of)[key].overrules}
    entries = {} if path is None else _read(of, path, passed_over={*given, *overruled})
    try:
        return of(**{name: value for name, (value, _) in entries.items()}, **given)
    except MissingSettingError as error:
        where = "" if path is None else f"{path}: "
        raise MissingSettingError(f"{where}{error}", setting=error.setting) from error
    except ConfigurationError as error:
        name = str(error).partition(" ")[0]
        if name in entries:
            raise ConfigurationError(f"{path}, line {entries[name][1]}: {error}") from error
        raise


def _read(
    of: type[Settings], path: str, *, passed_over: Collection[str]
) -> dict[str, tuple[Any, int]]:
    """Return the settings in a file by name, each with its line."""
    root = _parse(path)
    if root is None:
        raise ConfigurationError(f"{path}: holds no settings; write `name: value`, one a line")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(
            f"{path}, line {_line(root)}: {_shown(root)}, expected settings as `name: value`"
        )
    known = fields(of)
    lines: dict[str, int] = {}
    entries: dict[str, tuple[Any, int]] = {}
    for key, node in root.value:
        where, name = f"{path}, line {_line(key)}", key.value
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigurationError(f"{where}: {_shown(key)}, expected the name of a setting")
        if name not in known:
            raise ConfigurationError(f"{where}: {unknown_setting(of, name)}")
        if name in lines:
            raise ConfigurationError(
                f"{where}: {name} stands in line {lines[name]} already; give it once"
            )
        lines[name] = _line(key)
        try:
            if name not in passed_over:
                entries[name] = (_value(node, known[name]), lines[name])
        except ValueError:
            raise ConfigurationError(
                f"{path}, line {_line(node)}: {name} is {_shown(node)}, expected "
                f"{known[name].expected}"
            ) from None
    return entries


def _parse(path: str) -> yaml.Node | None:
    text = read_text(path, "file; expected a YAML file of settings", ConfigurationError)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # it can hold itself, or grow without end
                where = _place(path, event.start_mark)
                raise ConfigurationError(
                    f"{where}: an alias (*{event.anchor}), expected the value itself"
                )
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = _place(path, error.problem_mark or error.context_mark)
        quoted = "; put a name that begins with @ in quotes" if "'@'" in str(error) else ""
        raise ConfigurationError(f"{where}: not YAML ({error.problem}){quoted}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML ({first_line(error)})") from error
    except RecursionError:
        raise ConfigurationError(f"{path}: nested too deeply; expected `name: value`") from None
    return node


def _place(path: str, mark: Any) -> str:
    return f"{path}, line {mark.line + 1}" if mark else path


def _value(node: yaml.Node, field: Field) -> Any:
    if field.many and isinstance(node, yaml.MappingNode):
        return field.parse({_text(key): _guess(value) for key, value in node.value})
    if field.many and isinstance(node, yaml.ScalarNode):
        return field.parse([_text(node)])  # one text stands for a list of one
    if isinstance(node, yaml.SequenceNode):
        return field.parse([_text(item) for item in node.value])
    return field.parse(_text(node))


def _text(node: yaml.Node) -> str | None:
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
        raise ValueError
    return None if node.tag.endswith(":null") else str(node.value)


def _guess(node: yaml.Node) -> Any:
    """Read a value whose type nobody declares, as the command line reads `KEY=VALUE`."""
    if node.tag not in _PLAIN_TAGS:
        raise ValueError
    if isinstance(node, yaml.MappingNode):
        return {_text(key): _guess(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_guess(item) for item in node.value]
    text = _text(node)
    quoted = getattr(node, "style", None) in ("'", '"')
    return text if text is None or quoted else json_or_text(text)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "empty"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of settings"
