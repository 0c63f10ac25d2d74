"""Paths on the command line."""

from pathlib import Path
from typing import Any

import click

from duet_unlearn.files import user_path


class FolderPath(click.ParamType[Path]):
    """A folder as the user typed it, `~` resolved; an empty text names none."""

    name = "dir"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        del ctx
        return user_path(value, param.opts[0] if param is not None else "path")
