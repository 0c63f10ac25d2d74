"""What commands print: text for people, or with --json one JSON document in its place."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from duet_unlearn.errors import ConfigurationError, OutputError, StoppedError
from duet_unlearn.files import refuse_inside_cache, remove_temporary_files, write_text

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.format.manifest import Manifest

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document on standard output, in place of the text.",
)
"""The same for every command that has a result."""


def json_text(document: Any) -> str:
    """Return a JSON document; halves of surrogate pairs, which no UTF-8 has, become `?`."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
    return text.encode("utf-8", "replace").decode("utf-8")


def print_json(document: Any) -> None:
    """Print one JSON document."""
    click.echo(json_text(document))


def print_cache(
    cache: str | Path,
    manifest: "Manifest",
    *,
    hit: bool,
    done: str,
    counts: Mapping[str, int],
    as_json: bool,
) -> None:
    """Print a finished cache and the pin under which others can name it."""
    if as_json:
        document = {"cache": str(cache), "digest": manifest.digest, "hit": hit}
        document |= {"rows": manifest.num_rows, **counts}
        print_json(document | {"shards": len(manifest.shards), "bytes": manifest.num_bytes})
        return
    splits = ", ".join(f"{sums.rows} {split}" for split, sums in manifest.splits.items())
    how = "found finished" if hit else done
    click.echo(f"{cache}: {splits} ({how}), {manifest.num_bytes} bytes")
    click.echo(f"pin it as {cache}@{manifest.digest}")


def check_target(target: Path, *marks: str) -> None:
    """Refuse a file that cannot or must not be written before the work, not after it.

    Args:
        target: The file.
        marks: Texts that an earlier result of the same command holds, the first of them any of
            ours; another file stays.

    Raises:
        ConfigurationError: It lies inside a cache, is a folder or another's, or its folder is
            missing.
        OutputError: Nothing can be written into its folder.
    """
    refuse_inside_cache(target)
    if target.is_dir():
        raise ConfigurationError(f"{target}: a folder, expected the name of a file")
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: no folder {target.parent}; make it first")
    if os.path.lexists(target):
        held = target.read_bytes() if target.is_file() else b""
        found = [mark.encode() in held for mark in marks]
        if not all(found):
            what = "nothing in it shows that duet-unlearn wrote it"
            if found[0]:
                what = "it is no result of this command"
            raise ConfigurationError(f"{target}: is there, and {what}; choose another name")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _not_written(target, error) from error


def write_target(target: Path, text: str) -> None:
    """Write a file that was checked before the work.

    Raises:
        OutputError: It cannot be written after all.
    """
    remove_temporary_files(target.parent, re.escape(target.name))
    try:
        write_text(target, text)
    except OutputError as error:
        raise _not_written(target, error.__cause__ or error) from error


def _not_written(target: Path, error: BaseException) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"{target}: cannot be written ({reason}); name a file in another folder")


@contextlib.contextmanager
def measuring(out: Path | None = None, entry: str = "") -> Iterator[None]:
    """Look at `--out` before work of which no part is kept, and say so where it is stopped.

    Args:
        out: Where the document goes.
        entry: A key that the documents of this command have, and no others.

    Raises:
        ConfigurationError: As `check_target`.
        OutputError: So, too.
        StoppedError: The user stopped it.
    """
    if out is not None:
        check_target(out, '"duet-unlearn": "', f'"{entry}": ')  # the first among the versions
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError("stopped; no part of it is kept, so start it again") from error


class Report(Protocol):
    """A result that is a JSON document."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""


def print_report(table: str, report: Report, *, as_json: bool, out: Path | None) -> None:
    """Print a table and, where asked for, the document instead of it and into a file."""
    # The table first: it is not lost when the file cannot be written.
    click.echo(table, err=as_json)
    if not as_json and out is None:
        return
    document = json_text(report.to_json())
    if as_json:
        click.echo(document)
    if out is not None:
        write_target(out, document + "\n")
