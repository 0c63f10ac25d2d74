"""Compare two caches: what differs between their recipes, and which queries only one has."""

from collections.abc import Iterator
from typing import Any

from duet_unlearn.teacher_cache.format.row_group import text_key
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.urls import redact_url, visible

_SHOWN = 5


def diff(a: str, b: str) -> dict[str, Any]:
    """Compare two caches, `PATH` or `PATH@sha256:DIGEST` each; reads no signals.

    Returns:
        How cache A differs from cache B as JSON values; queries are known by split and text.
        `same` says whether recipes and queries are the same, `recipe` has `entry: A / B` for each
        entry of the recipes that differs, `common_queries` is the number of queries that both have,
        and `only_here` of `a` and `b` lists those that only this one has. See `render_difference`
        for the same in words.

    Raises:
        CacheError: One is no finished cache, or is damaged.
        MismatchError: One has another digest than the one given.
    """
    readers = CacheReader.open(a), CacheReader.open(b)
    # Hashes, not texts: of rows that both have, nothing is kept.
    ours, theirs = (
        {text_key(split, text) for _, split, text in reader.identities()} for reader in readers
    )
    sides: list[dict[str, Any]] = [
        {
            "cache": redact_url(name),
            "digest": reader.manifest.digest,
            "only_here": [
                {"query_id": query_id, "split": split, "query": text}
                for query_id, split, text in reader.identities()
                if text_key(split, text) not in others
            ],
        }
        for name, reader, others in zip((a, b), readers, (theirs, ours), strict=True)
    ]
    recipe = readers[0].manifest.recipe.differences(readers[1].manifest.recipe)
    return {
        "same": not recipe and not any(side["only_here"] for side in sides),
        "recipe": recipe,
        "common_queries": readers[0].num_rows - len(sides[0]["only_here"]),
        "a": sides[0],
        "b": sides[1],
    }


def render_difference(difference: dict[str, Any]) -> str:
    """Return a difference as text for a terminal."""
    return "\n".join(visible(line) for line in _lines(difference))


def _lines(difference: dict[str, Any]) -> Iterator[str]:
    sides = {"A": difference["a"], "B": difference["b"]}
    for letter, side in sides.items():
        yield f"{letter}  {side['cache']}  {side['digest'][:19]}"
    yield "recipe   " + ("differs (A / B)" if difference["recipe"] else "the same")
    yield from (f"  {entry}" for entry in difference["recipe"])
    only = {letter: side["only_here"] for letter, side in sides.items()}
    counts = ", ".join(f"{len(rows)} only in {letter}" for letter, rows in only.items())
    yield f"queries  {difference['common_queries']} in both, {counts}"
    for letter, rows in only.items():
        if rows:
            yield f"only in {letter}:"
        for row in rows[:_SHOWN]:
            yield f"  {row['split']:<7} {row['query_id']}  {row['query'][:60]}"
        if len(rows) > _SHOWN:
            yield f"  and {len(rows) - _SHOWN} more; --json lists all"
