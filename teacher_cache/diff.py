"""Compare two caches: what differs between their recipes, and which queries only one has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from duet_unlearn.teacher_cache.format.row_group import Identity, text_key
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.urls import redact_url, visible

_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDifference:
    """How cache A differs from cache B; queries are known by split and text."""

    names: tuple[str, str]
    digests: tuple[str, str]
    recipe: tuple[str, ...]
    """`entry: A / B` for each entry of the recipes that differs."""
    common: int
    """Queries that both have."""
    only: tuple[tuple[Identity, ...], tuple[Identity, ...]]
    """Id, split and text of the queries that only A has, and that only B has."""

    @property
    def same(self) -> bool:
        """Whether recipes and queries are the same."""
        return not self.recipe and not any(self.only)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""

        def side(number: int) -> dict[str, Any]:
            return {
                "cache": self.names[number],
                "digest": self.digests[number],
                "only_here": [
                    {"query_id": query_id, "split": split, "query": text}
                    for query_id, split, text in self.only[number]
                ],
            }

        return {
            "same": self.same,
            "recipe": list(self.recipe),
            "common_queries": self.common,
            "a": side(0),
            "b": side(1),
        }


def diff(a: str, b: str) -> CacheDifference:
    """Compare two caches, `PATH` or `PATH@sha256:DIGEST` each; reads no signals.

    Raises:
        CacheError: One is no finished cache, or is damaged.
        MismatchError: One has another digest than the one given.
    """
    first, second = CacheReader.open(a), CacheReader.open(b)
    # Hashes, not texts: of rows that both have, nothing is kept.
    ours, theirs = (
        {text_key(*row[1:]) for row in reader.identities()} for reader in (first, second)
    )
    only_a = tuple(row for row in first.identities() if text_key(*row[1:]) not in theirs)
    only_b = tuple(row for row in second.identities() if text_key(*row[1:]) not in ours)
    return CacheDifference(
        names=(redact_url(a), redact_url(b)),
        digests=(first.manifest.digest, second.manifest.digest),
        recipe=tuple(first.manifest.recipe.differences(second.manifest.recipe)),
        common=first.num_rows - len(only_a),
        only=(only_a, only_b),
    )


def render_difference(difference: CacheDifference) -> str:
    """Return a difference as text for a terminal."""
    return "\n".join(visible(line) for line in _lines(difference))


def _lines(difference: CacheDifference) -> Iterator[str]:
    for letter, name, digest in zip("AB", difference.names, difference.digests, strict=True):
        yield f"{letter}  {name}  {digest[:19]}"
    yield "recipe   " + ("differs (A / B)" if difference.recipe else "the same")
    yield from (f"  {entry}" for entry in difference.recipe)
    only_a, only_b = difference.only
    yield f"queries  {difference.common} in both, {len(only_a)} only in A, {len(only_b)} only in B"
    for letter, only in zip("AB", difference.only, strict=True):
        if only:
            yield f"only in {letter}:"
        yield from (f"  {split:<7} {name}  {text[:60]}" for name, split, text in only[:_SHOWN])
        if len(only) > _SHOWN:
            yield f"  and {len(only) - _SHOWN} more; --json lists all"
