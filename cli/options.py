"""A command whose flags, help page and suggestions come from a class of settings."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource

from duet_unlearn.errors import MissingSettingError
from duet_unlearn.files import user_path
from duet_unlearn.settings import Field, Settings, fields, read_pairs, suggest
from duet_unlearn.settings_file import load

T = TypeVar("T", bound=Settings)
OTHERS = "Other options"


class SettingsCommand(click.Command):
    """A command with a flag for each field, under the headings that the fields declare.

    Flags that the command has besides stand under the heading they name with `Extra`, else last.
    """

    def __init__(self, *args: Any, settings: type[Settings], **others: Any) -> None:
        super().__init__(*args, **others)
        self.settings = settings
        self.declared = {
            name: field for name, field in fields(settings).items() if field.flag is not None
        }
        self.params = [_parameter(field) for field in self.declared.values()] + self.params

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an unknown flag ends with the one that was meant."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = (
                fields(self.settings)[n].flag for n in suggest(self.settings, error.option_name)
            )
            meant = [flag.partition("/")[0] for flag in flags if flag and flag.startswith("-")]
            if not meant:
                raise
            # click would drop a possibility that is spelled otherwise.
            message = f"{error.message} Did you mean {' or '.join(map(repr, meant))}?"
            raise click.NoSuchOption(error.option_name, message, ctx=error.ctx) from None

    def given(self, ctx: click.Context) -> dict[str, Any]:
        """Return the settings that the command line gives, without defaults."""
        default = ParameterSource.DEFAULT
        names = (name for name in self.declared if ctx.get_parameter_source(name) is not default)
        return {name: ctx.params[name] for name in names}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a heading."""
        # Headings under which something has to be given come first.
        by_need = sorted(
            self.declared.values(), key=lambda field: field.default is not dataclasses.MISSING
        )
        groups: dict[str, list[tuple[str, str]]] = {field.group: [] for field in by_need}
        # Extra flags first: they lead to the settings below them.
        for parameter in sorted(self.get_params(ctx), key=lambda p: not isinstance(p, Extra)):
            group = getattr(parameter, "group", None)
            if parameter.name in self.declared:
                group = self.declared[parameter.name].group
            if isinstance(parameter, click.Option) and (row := parameter.get_help_record(ctx)):
                groups.setdefault(group if group in groups else OTHERS, []).append(row)
        others = groups.pop(OTHERS, [])
        for group, rows in [*groups.items(), (OTHERS, others)]:
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)


def read_settings(ctx: click.Context, of: type[T], path: str | None = None, **others: Any) -> T:
    """Return the settings of a command: its flags, which win, others, and a YAML file's.

    Raises:
        click.UsageError: One that has no default is in none of them.
    """
    command = cast("SettingsCommand", ctx.command)
    try:
        return load(of, path, {**others, **command.given(ctx)})
    except MissingSettingError as error:
        flag = str(fields(of)[error.setting].flag)
        kind = "option" if flag.startswith("-") else "argument"
        reads_file = any(parameter.name == "config_file" for parameter in command.params)
        hint = f"; give it, or write `{error.setting}:` into the file of --config"
        raise click.UsageError(
            f"Missing {kind} '{flag}'{hint if reads_file else ''}.", ctx=ctx
        ) from error


class Extra(click.Option):
    """A flag that is no setting, under a heading of the settings."""

    def __init__(self, names: Sequence[str], *, group: str, **settings: Any) -> None:
        super().__init__(names, **settings)
        self.group = group


class _Text(click.ParamType[Any]):
    """A text that is read by the type of its field."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the field's value."""
        if not isinstance(value, str):
            return value
        try:
            return self.field.parse(value)
        except ValueError:
            self.fail(f"{value!r}, expected {self.field.expected}", param, ctx)


def _parameter(field: Field) -> click.Parameter:
    flag = str(field.flag)
    if not flag.startswith("-"):
        return click.Argument([field.name], required=False, metavar=flag)
    settings: dict[str, Any] = {"help": field.help, "metavar": field.metavar}
    if isinstance(field.default, str | int | float):
        settings["default"] = field.default
    if bool in field.alternatives:
        settings["is_flag"] = True
    elif Path in field.alternatives:
        settings["type"] = FolderPath()
    elif field.choices:
        settings["type"] = click.Choice(field.choices)
    elif field.many:
        settings["multiple"] = True
        if isinstance(field.default, dict):
            settings["callback"] = _pairs
    else:
        settings["type"] = _Text(field)
        settings["metavar"] = field.metavar or field.placeholder
    return click.Option([flag, field.name], **settings)


def _pairs(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    try:
        return read_pairs(values)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=param) from None


class FolderPath(click.ParamType[Path]):
    """A folder or file as the user typed it, `~` resolved; an empty text names none."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        del ctx
        return user_path(value, param.opts[0] if param is not None else "path")


config_option = click.option(
    "--config",
    "config_file",
    cls=Extra,
    group="Where from, where to",
    metavar="FILE",
    help="Read settings from this YAML file; flags win over it.",
)
models_argument = click.argument("words", nargs=-1, required=True, metavar="MODEL...")


def out_option(read: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `--out FILE`; `read` says who reads the file."""
    text = f"Also write everything to this JSON file: {read}."
    return click.option("--out", type=FolderPath(), metavar="FILE", help=text)
