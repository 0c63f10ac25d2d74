"""Rows of query files (JSON lines, CSV, Parquet), with the line that each one comes from.

Files are read by line and not through a data frame library: an error has to name the line that
an editor shows, and a column must not change its type because one cell looks like a number.
"""

import csv
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from duet_unlearn.data.hub_datasets import load_hub_dataset
from duet_unlearn.errors import DataError, first_line
from duet_unlearn.files import user_path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
OPTIONAL_COLUMNS = ("id", "answer", "aliases", "response", "kind", "wrong_answers")
"""What a table may have beside a query; further columns are not read."""
_LONGEST_CELL = 1 << 30
BOM = b"\xef\xbb\xbf"

Row = dict[str, object]
Rows = Iterator[tuple[str, Row]]
"""Rows, each with its place as an error names it: `queries.csv:7`, `queries.parquet row 7`."""


def open_rows(source: str, *, needs_one_of: Sequence[str]) -> Rows:
    """Open a query file or a hub dataset; rows are read while they are iterated.

    Raises:
        ConfigurationError: the source is empty, or names the home of nobody.
        DataError: here or while iterating; the message names the file and, where one is at
            fault, the line.
    """
    if source.startswith("hub:"):
        return _hub_rows(source, needs_one_of)
    path = user_path(source, "query file")
    _check_file(path)
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, needs_one_of)
    if path.suffix.lower() == ".csv":
        return _csv_rows(path, needs_one_of)
    if path.suffix.lower() == ".json" and _starts_with_bracket(path):
        return _array_rows(path)
    return _line_rows(path)


def _usable_columns(source: str, columns: Sequence[str], needs_one_of: Sequence[str]) -> list[str]:
    """Return the columns that are read; refuse a table that has no query in any."""
    if not set(columns) & set(needs_one_of):
        found = ", ".join(repr(column) for column in columns) or "none"
        hint = "; separate the fields with commas" if len(columns) == 1 and ";" in found else ""
        raise DataError(
            f"{source}: no column named {', '.join(needs_one_of[:-1])} or {needs_one_of[-1]}; "
            f"found {found}{hint}"
        )
    return [column for column in columns if column in {*needs_one_of, *OPTIONAL_COLUMNS}]


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            hint = f"name a file in it: {', '.join(inside[:5])}" if inside else "expected a file"
            raise DataError(f"{path}: this is a folder; {hint}")
        if not path.exists():
            raise DataError(f"{path}: no such file{_close_matches(path)}")
        if path.suffix.lower() not in SUFFIXES:
            packed = path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip")
            hint = "; unpack it first" if packed else ""
            raise DataError(
                f"{path}: file type {path.suffix or 'without a suffix'!s} is unknown: expected "
                f"{', '.join(SUFFIXES)}, or hub:NAME{hint}"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; expected one query a row")
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error) from None


def _close_matches(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error})")


def _starts_with_bracket(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
    except OSError as error:
        raise _unreadable(path, error) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends; only a line feed ends a line, as in an editor."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield number, (raw.removeprefix(BOM) if number == 1 else raw).decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x} at "
                        f"position {error.start + 1} of the line); save the file as UTF-8"
                    ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _line_rows(path: Path) -> Rows:
    for number, line in _lines(path):
        if not line.strip():
            continue
        row = _parse(line.rstrip("\r\n"), path, number, "; expected one object a line")
        where = f"{path}:{number}"
        yield where, _expect_object(row, where)


def _parse(text: str, path: Path, first: int, hint: str = "") -> Any:
    """Read JSON that begins in a line of a file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{path}:{first + error.lineno - 1}"
        raise DataError(
            f"{where}: not JSON ({error.msg} at character {error.colno}){hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{first}: not usable JSON ({error})") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object that names each key once: which of two values counts would be a guess."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} stands in one object twice")
        found[name] = value
    return found


def _array_rows(path: Path) -> Rows:
    """Items of a JSON array, the other thing that people save as `.json`."""
    text = "".join(line for _, line in _lines(path))
    items = _parse(text, path, 1)
    for number, item in enumerate(items, start=1):
        where = f"{path} item {number}"
        yield where, _expect_object(item, where)


def _expect_object(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f'{where}: expected an object such as {{"query": "..."}}, found {value!r:.60}'
        )
    return value


def _csv_rows(path: Path, needs_one_of: Sequence[str]) -> Rows:
    # Strict: an unclosed quote would otherwise swallow the rest of the file as one query.
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    csv.field_size_limit(_LONGEST_CELL)
    header: list[str] | None = None
    first_of_row = 1
    try:
        for fields in reader:
            start, first_of_row = first_of_row, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                _usable_columns(str(path), header, needs_one_of)
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{start}: two columns have the same name")
            elif len(fields) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(fields)} fields, expected {len(header)} as in the "
                    "header; quote a field that holds a comma"
                )
            else:
                yield f"{path}:{start}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{first_of_row}: not CSV ({error})") from None


def _parquet_rows(path: Path, needs_one_of: Sequence[str]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            wanted = _usable_columns(str(path), file.schema_arrow.names, needs_one_of)
            batches = file.iter_batches(batch_size=8192, columns=wanted)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path} row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = first_line(error).rstrip(".")
        raise DataError(f"{path}: broken or cut-off Parquet ({reason}); copy it again") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _hub_rows(source: str, needs_one_of: Sequence[str]) -> Rows:
    dataset = load_hub_dataset(source)
    wanted = _usable_columns(source, dataset.column_names, needs_one_of)
    for number, row in enumerate(dataset.select_columns(wanted), start=1):
        yield f"{source} row {number}", row
