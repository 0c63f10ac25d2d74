"""The manifest: what a finished cache holds, written last and checked before anything is read."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.fingerprint import sha256_json
from duet_unlearn.errors import CacheError, CorruptCacheError
from duet_unlearn.files import user_path, write_text
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHARD_FOLDER,
    SPLITS,
    rows_per_group,
)
from duet_unlearn.teacher_cache.format.statistics import SplitStatistics
from duet_unlearn.teacher_cache.format.strict_json import parse_json

MAX_MANIFEST_BYTES = 16 << 20
# A row takes at least a byte of its shard, and a row group describes its eight columns in the
# footer: counts beyond that are lies, and would only cost memory.
_LEAST_GROUP_BYTES = 256
_CHECK_ENTRIES, _CHECK_TEXT = 64, 2000
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"(\d{5,9})-of-(\d{5,9})\.parquet")
_ENTRIES = {
    "format",
    "format_version",
    "recipe",
    "recipe_id",
    "teacher",
    "queries",
    "engines",
    "shards",
    "splits",
    "samples",
    "part",
    "check",
    "views",
    "digest",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    name: str
    """File name inside `shards/`."""
    rows: dict[str, int]
    """Rows a split; a shard holds its forget rows first."""
    row_group_rows: int
    """Rows a row group; the last may be shorter."""
    bytes: int
    """Size of the file."""
    sha256: str
    """`sha256:<hex>` of the file's bytes."""

    @property
    def num_rows(self) -> int:
        """Rows of both splits."""
        return sum(self.rows.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class PartOf:
    """Which part of a set of queries a cache holds: `build --shards I/N`."""

    number: int
    """From 1."""
    count: int
    queries: str
    """Fingerprint of the whole set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    recipe: Recipe
    teacher: str
    """The teacher's name as the builder gave it; informative only, the recipe identifies it."""
    queries: str
    """Fingerprint of the set of queries."""
    engines: tuple[dict[str, Any], ...]
    """Name, versions and settings of the engine; several where a build was resumed with another."""
    shards: tuple[ShardEntry, ...]
    splits: dict[str, SplitStatistics]
    """Totals a split."""
    samples: tuple[dict[str, Any], ...]
    """The teacher's strongest tokens for a few queries, decoded, for people to look at."""
    part: PartOf | None = None
    """Set where the cache holds one part of a set of queries, which `merge` joins."""
    check: dict[str, Any] | None = None
    """How good the teacher is on a sample of the queries, as the build measured it: names and
    numbers for people to read; None where it was not measured."""
    views: tuple[str, ...] = ()
    """Texts of the shapes in which retain queries are held too."""
    digest: str = ""
    """`sha256:<hex>` of the manifest without this entry: it names the cache."""

    @property
    def recipe_id(self) -> str:
        """Id of the recipe."""
        return self.recipe.recipe_id

    @property
    def num_rows(self) -> int:
        """Queries in the cache."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values, its digest computed anew."""
        body = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.to_json(),
            "recipe_id": self.recipe_id,
            "teacher": self.teacher,
            "queries": self.queries,
            "engines": list(self.engines),
            "shards": [
                {
                    "name": shard.name,
                    "rows": shard.rows,
                    "row_group_rows": shard.row_group_rows,
                    "bytes": shard.bytes,
                    "sha256": shard.sha256,
                }
                for shard in self.shards
            ],
            "splits": {split: self.splits[split].to_json() for split in SPLITS},
            "samples": list(self.samples),
            "part": None if self.part is None else asdict(self.part),
            "check": self.check,
            "views": list(self.views),
        }
        return {**body, "digest": sha256_json(body)}

    def write(self, cache: Path) -> "Manifest":
        """Write `manifest.json` into a cache folder; return the manifest with its digest.

        Raises:
            CacheError: The file cannot be written.
        """
        value = self.to_json()
        write_text(cache / MANIFEST_NAME, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        return replace(self, digest=value["digest"])


def read_manifest(cache: Path) -> Manifest:
    """Read and check the manifest of a finished cache.

    Raises:
        CacheError: There is no cache there, or an unfinished one.
        CorruptCacheError: The manifest is damaged, edited, or of another format version.
    """
    path = cache / MANIFEST_NAME
    if not path.is_file():
        raise _absent(cache)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise CorruptCacheError(f"{path}: cannot be read ({error.strerror})") from error
    return decode_manifest(data, str(path))


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Check the untrusted bytes of a manifest and return what they hold.

    Args:
        data: The file's bytes; a caller reads at most `MAX_MANIFEST_BYTES` and one more.
        where: Path or URL of the file, for messages.

    Raises:
        CorruptCacheError: The manifest is damaged, edited, too large or of another version.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise CorruptCacheError(
            f"{where}: more than {MAX_MANIFEST_BYTES} bytes; get the cache again"
        )
    try:
        return parse_manifest(parse_json(data))
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{where}: {error}") from None
    except ValueError as error:
        reason = str(error).splitlines()[0][:160]
        raise CorruptCacheError(
            f"{where}: not readable as JSON ({reason}); get the cache again"
        ) from error


def is_cache_folder(folder: Path) -> bool:
    """Say whether what a folder holds shows that a cache was written there, finished or not."""
    try:
        if (folder / MANIFEST_NAME).is_file():
            read_manifest(folder)
            return True
        shards = [path.name for path in (folder / SHARD_FOLDER).iterdir()]
    except (OSError, CacheError):
        return False
    return any(map(_SHARD_NAME.fullmatch, shards))


def _absent(cache: Path) -> CacheError:
    if not cache.exists():
        return CacheError(f"{cache}: no such folder; expected a teacher cache (duet-cache build)")
    if not cache.is_dir():
        return CacheError(f"{cache}: a file, expected a cache folder with {MANIFEST_NAME} in it")
    if (cache / SHARD_FOLDER).is_dir():
        return CacheError(
            f"{cache}: unfinished, no {MANIFEST_NAME}; run its duet-cache build again, it resumes"
        )
    return CacheError(f"{cache}: not a teacher cache, no {MANIFEST_NAME}; check the path")


def parse_manifest(value: object) -> Manifest:
    """Check untrusted JSON values and return the manifest they hold.

    Raises:
        CorruptCacheError: The values are not a manifest of format version 1, or its digest is
            not that of its content.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT_NAME:
        raise CorruptCacheError("not the manifest of a teacher cache; check the path")
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise CorruptCacheError(
            f"format version {str(version)[:40]}, expected {FORMAT_VERSION}; update duet-unlearn"
        )
    if set(value) != _ENTRIES:
        names = ", ".join(sorted(str(key) for key in set(value) ^ _ENTRIES))
        raise CorruptCacheError(f"entries missing or unknown: {names[:200]}; get the cache again")
    try:
        found = sha256_json({k: v for k, v in value.items() if k != "digest"})
    except (RecursionError, ValueError):
        raise CorruptCacheError("nested too deep; get the cache again") from None
    if value["digest"] != found:
        raise CorruptCacheError(
            f"edited or damaged: its digest says {str(value['digest'])[:19]}, its content is "
            f"{found[:19]}; get the cache again"
        )
    recipe = Recipe.from_json(value["recipe"])
    if value["recipe_id"] != recipe.recipe_id:
        raise CorruptCacheError("recipe_id is not that of its recipe; get the cache again")
    manifest = Manifest(
        recipe=recipe,
        teacher=_text(value, "teacher"),
        queries=_sha256(value["queries"], "queries"),
        engines=_objects(value, "engines"),
        shards=_shards(value["shards"], rows_per_group(recipe.top_k, recipe.positions)),
        splits=_splits(value["splits"]),
        samples=_samples(value),
        part=_part(value["part"]),
        check=_check(value["check"]),
        views=_views(value["views"]),
        digest=found,
    )
    for split in SPLITS:
        listed = sum(shard.rows[split] for shard in manifest.shards)
        if listed != manifest.splits[split].rows:
            raise CorruptCacheError(
                f"{listed} {split} rows in the shards, {manifest.splits[split].rows} in the totals"
            )
    return manifest


def _shards(value: object, most_group_rows: int) -> tuple[ShardEntry, ...]:
    if not isinstance(value, list) or not value:
        raise CorruptCacheError("shards: expected a list of at least one")
    return tuple(
        _shard(entry, index, len(value), most_group_rows) for index, entry in enumerate(value)
    )


def _shard(value: object, index: int, count: int, most_group_rows: int) -> ShardEntry:
    where = f"shards[{index}]"
    if not isinstance(value, dict) or set(value) != {
        "name",
        "rows",
        "row_group_rows",
        "bytes",
        "sha256",
    }:
        raise CorruptCacheError(f"{where}: expected name, rows, row_group_rows, bytes and sha256")
    # Only this exact name is allowed, so no entry can point out of the folder.
    if value["name"] != shard_name(index, count):
        raise CorruptCacheError(
            f"{where}: name {str(value['name'])[:60]!r}, expected {shard_name(index, count)!r}"
        )
    rows = value["rows"]
    if not isinstance(rows, dict) or set(rows) != set(SPLITS):
        raise CorruptCacheError(f"{where}: rows: expected a count for forget and retain")
    for number in (*rows.values(), value["row_group_rows"], value["bytes"]):
        if type(number) is not int or not 0 <= number < 1 << 50:
            raise CorruptCacheError(f"{where}: {str(number)[:40]} is not a count")
    total, group = sum(rows.values()), value["row_group_rows"]
    if not 1 <= total <= min(value["bytes"], (1 << 31) - 1):
        raise CorruptCacheError(f"{where}: {total} rows in {value['bytes']} bytes")
    if not 1 <= group <= most_group_rows or total // group > value["bytes"] // _LEAST_GROUP_BYTES:
        raise CorruptCacheError(
            f"{where}: {total} rows in row groups of {group} and {value['bytes']} bytes, expected "
            f"groups of at most {most_group_rows} rows and at least {_LEAST_GROUP_BYTES} bytes"
        )
    return ShardEntry(
        name=value["name"],
        rows={split: rows[split] for split in SPLITS},
        row_group_rows=value["row_group_rows"],
        bytes=value["bytes"],
        sha256=_sha256(value["sha256"], f"{where}: sha256"),
    )


def _splits(value: object) -> dict[str, SplitStatistics]:
    if not isinstance(value, dict) or set(value) != set(SPLITS):
        raise CorruptCacheError("splits: expected forget and retain")
    return {split: SplitStatistics.from_json(value[split]) for split in SPLITS}


def _part(value: object) -> PartOf | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"number", "count", "queries"}:
        raise CorruptCacheError("part: expected number, count and queries")
    number, count = value["number"], value["count"]
    if type(number) is not int or type(count) is not int or not 1 <= number <= count < 100_000:
        raise CorruptCacheError(f"part: {str(number)[:20]} of {str(count)[:20]} is no part")
    return PartOf(number=number, count=count, queries=_sha256(value["queries"], "part: queries"))


def _views(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CorruptCacheError("views: expected a list of texts")
    return tuple(value)


def _check(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    plain = isinstance(value, dict) and all(
        isinstance(item, str | int | float) and len(str(item)) <= _CHECK_TEXT
        for item in value.values()
    )
    if not plain or len(value) > _CHECK_ENTRIES:  # type: ignore[arg-type]
        raise CorruptCacheError("check: expected a few names with numbers or short texts")
    return value  # type: ignore[return-value]


def _text(value: dict[str, Any], name: str) -> str:
    if not isinstance(value[name], str):
        raise CorruptCacheError(f"{name}: expected text, found {type(value[name]).__name__}")
    return str(value[name])


def _objects(value: dict[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    entries = value[name]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CorruptCacheError(f"{name}: expected a list of objects")
    return tuple(entries)


def _samples(value: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Check the shape of the samples, so that whoever shows them need not."""
    samples = _objects(value, "samples")
    for sample in samples:
        texts = [sample.get(name) for name in ("query_id", "split", "query")]
        response, strongest = sample.get("response"), sample.get("strongest")
        if (
            not all(isinstance(text, str) for text in texts)
            or not isinstance(response, list)
            or not isinstance(strongest, list)
            or not all(isinstance(text, str) for text in response)
            or not all(map(_is_strongest, strongest))
        ):
            raise CorruptCacheError(
                "samples: expected query_id, split, query, response, and id, text, logit and "
                "probability of each strongest token"
            )
    return samples


def _is_strongest(token: object) -> bool:
    if not isinstance(token, dict) or set(token) != {"id", "text", "logit", "probability"}:
        return False
    numbers = (token["id"], token["logit"], token["probability"])
    return isinstance(token["text"], str) and all(
        type(number) in (int, float) and abs(number) < 1 << 53 for number in numbers
    )


def _sha256(value: object, where: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise CorruptCacheError(f"{where}: {str(value)[:40]!r} is not sha256:<64 hex digits>")
    return value


def shard_name(index: int, count: int) -> str:
    """Return the file name of shard `index` of `count`."""
    return f"{index:05d}-of-{count:05d}.parquet"


def split_pin(cache: str | Path) -> tuple[Path, str | None]:
    """Split `PATH@sha256:DIGEST` into path and digest; the digest is None where there is none.

    Raises:
        CacheError: What follows the `@sha256:` is not 64 hex digits.
    """
    text = str(cache)
    path, separator, digest = text.rpartition("@sha256:")
    if not separator:
        return _local(text), None
    pin = f"sha256:{digest.lower()}"
    if not _SHA256.fullmatch(pin):
        raise CacheError(f"{text}: the digest after @sha256: has to be 64 hex digits")
    return _local(path), pin


def _local(name: str) -> Path:
    return user_path(name, "cache") if name else Path()
