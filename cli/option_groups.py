"""A command whose help page lists its options under headings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """Options that stand together in the help page."""

    title: str
    options: tuple[click.Option, ...]


class GroupedCommand(click.Command):
    """A command of several option groups; what belongs to none is listed last.

    Args:
        groups: Headings and their options, in the order of the help page.
    """

    def __init__(self, *args: Any, groups: Sequence[OptionGroup], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.groups = tuple(groups)
        self.params += [option for group in self.groups for option in group.options]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a group."""
        grouped = {id(option) for group in self.groups for option in group.options}
        others = tuple(
            param
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and id(param) not in grouped
        )
        for group in (*self.groups, OptionGroup("Other options", others)):
            rows = [row for option in group.options if (row := option.get_help_record(ctx))]
            if rows:
                with formatter.section(group.title):
                    formatter.write_dl(rows)
