"""The manifest: what a finished cache holds, written last and checked before anything is read."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pydantic

from duet_unlearn.data.models.fingerprint import sha256_json
from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError, first_line
from duet_unlearn.files import CACHE_FORMAT, write_text
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import (
    FORMAT_VERSIONS,
    MANIFEST_NAME,
    MAX_ROW_GROUPS,
    MAX_ROWS,
    MAX_SHARD_ROW_GROUPS,
    SHARD_FOLDER,
    SPLITS,
    rows_per_group,
)
from duet_unlearn.teacher_cache.format.statistics import SplitSums
from duet_unlearn.teacher_cache.format.strict_json import (
    Count,
    Sha256,
    checked,
    parse_json,
    says,
    with_entries,
)

MAX_MANIFEST_BYTES = 16 << 20
# A row takes at least a byte of its shard, and a row group describes its eight columns in the
# footer: counts beyond that are lies, and would only cost memory.
_LEAST_GROUP_BYTES = 256
_CHECK_ENTRIES, _CHECK_TEXT = 64, 2000
_SHARD_NAME = re.compile(r"(\d{5,9})-of-(\d{5,9})\.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    name: str
    """File name inside `shards/`."""
    rows: Annotated[dict[str, Count], with_entries(*SPLITS[:2], also=SPLITS[2:])]
    """Rows a split; a shard holds its splits in this order."""
    row_group_rows: Count
    """Rows a row group; the last may be shorter."""
    bytes: Count
    """Size of the file."""
    sha256: Sha256
    """`sha256:<hex>` of the file's bytes."""

    @property
    def index(self) -> int:
        """Its place among the shards, from 0, as its name says."""
        return int(self.name.partition("-")[0])

    @property
    def path(self) -> str:
        """Where it lies below a cache: `shards/NAME`."""
        return f"{SHARD_FOLDER}/{self.name}"

    @property
    def num_rows(self) -> int:
        """Rows of all splits."""
        return sum(self.rows.values())

    @property
    def row_group_sizes(self) -> list[int]:
        """Rows of each row group."""
        rows, most = self.num_rows, self.row_group_rows
        return [min(most, rows - start) for start in range(0, rows, most)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartOf:
    """Which part of a set of queries a cache holds: `build --shards I/N`."""

    number: Count
    """From 1."""
    count: Count
    queries: Sha256
    """Fingerprint of the whole set."""


def _is_check(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse all but numbers and short texts, a few of them."""
    if len(value) > _CHECK_ENTRIES or not all(
        isinstance(item, str | int | float) and len(str(item)) <= _CHECK_TEXT
        for item in value.values()
    ):
        raise ValueError
    return value


def _are_samples(samples: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Check the shape of the samples, so that whoever shows them need not."""
    for sample in samples:
        response, strongest = sample.get("response"), sample.get("strongest")
        if not (
            isinstance(response, list)
            and isinstance(strongest, list)
            and all(isinstance(sample.get(name), str) for name in ("query_id", "split", "query"))
            and all(isinstance(text, str) for text in response)
            and all(map(_is_strongest, strongest))
        ):
            raise ValueError
    return samples


def _is_strongest(token: object) -> bool:
    if not isinstance(token, dict) or set(token) != {"id", "text", "logit", "probability"}:
        return False
    numbers = (token["id"], token["logit"], token["probability"])
    return isinstance(token["text"], str) and all(
        type(number) in (int, float) and abs(number) < 1 << 53 for number in numbers
    )


_Objects = Annotated[tuple[dict[str, Any], ...], pydantic.FailFast()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    recipe: Annotated[Recipe, pydantic.PlainValidator(Recipe.from_json)]
    teacher: str
    """The teacher's name as the builder gave it; informative only, the recipe identifies it."""
    queries: Sha256
    """Fingerprint of the set of queries."""
    engines: _Objects
    """Name, versions and settings of the engine; several where a build was resumed with another."""
    shards: Annotated[
        tuple[Annotated[ShardEntry, with_entries(*ShardEntry.__dataclass_fields__)], ...],
        pydantic.FailFast(),
    ]
    splits: SplitSums
    """Totals a split."""
    samples: Annotated[
        _Objects,
        pydantic.AfterValidator(_are_samples),
        says(
            "expected a list of objects with query_id, split, query, response, and id, text, "
            "logit and probability of each strongest token"
        ),
    ]
    """The teacher's strongest tokens for a few queries, decoded, for people to look at."""
    part: Annotated[PartOf, with_entries(*PartOf.__dataclass_fields__)] | None = None
    """Set where the cache holds one part of a set of queries, which `merge` joins."""
    check: Annotated[
        Annotated[dict[str, Any], pydantic.AfterValidator(_is_check)] | None,
        says("expected a few names with numbers or short texts"),
    ] = None
    """How good the teacher is on a sample of the queries, as the build measured it: names and
    numbers for people to read; None where it was not measured."""
    views: Annotated[tuple[str, ...], pydantic.FailFast()] = ()
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
            "format": CACHE_FORMAT,
            "format_version": self.recipe.version,
            "recipe": self.recipe.to_json(),
            "recipe_id": self.recipe_id,
            "teacher": self.teacher,
            "queries": self.queries,
            "engines": list(self.engines),
            "shards": [asdict(shard) for shard in self.shards],
            "splits": {split: asdict(self.splits[split]) for split in self.recipe.splits},
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
        raise CorruptCacheError(
            f"{where}: not readable as JSON ({first_line(error)[:160]}); get the cache again"
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
    if any((cache / name).is_file() for name in ("config.json", "adapter_config.json")):
        return CacheError(f"{cache}: a model folder, expected a teacher cache; check the path")
    return CacheError(f"{cache}: not a teacher cache, no {MANIFEST_NAME}; check the path")


_MANIFEST = pydantic.TypeAdapter(Manifest)


def parse_manifest(value: object) -> Manifest:
    """Check untrusted JSON values and return the manifest they hold.

    Raises:
        CorruptCacheError: The values are not a manifest of a known version, or its digest is not
            that of its content.
    """
    if not isinstance(value, dict) or value.get("format") != CACHE_FORMAT:
        raise CorruptCacheError("not the manifest of a teacher cache; check the path")
    version = value.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise CorruptCacheError(
            f"format version {str(version)[:40]}, expected {' or '.join(map(str, FORMAT_VERSIONS))}"
            "; update duet-unlearn"
        )
    entries = {*Manifest.__dataclass_fields__, "format", "format_version", "recipe_id"}
    if value.keys() != entries:
        names = ", ".join(sorted(value.keys() ^ entries))
        raise CorruptCacheError(f"entries missing or unknown: {names[:200]}; get the cache again")
    try:
        digest = sha256_json({k: v for k, v in value.items() if k != "digest"})
    except (RecursionError, ValueError):
        raise CorruptCacheError("nested too deep; get the cache again") from None
    if value["digest"] != digest:
        raise CorruptCacheError(
            f"edited or damaged: its digest says {str(value['digest'])[:19]}, its content is "
            f"{digest[:19]}; get the cache again"
        )
    manifest = checked(_MANIFEST, {name: value[name] for name in Manifest.__dataclass_fields__})
    if value["recipe_id"] != manifest.recipe_id:
        raise CorruptCacheError("recipe_id is not that of its recipe; get the cache again")
    if version != manifest.recipe.version:
        raise CorruptCacheError(
            f"format version {version}, but its recipe is one of version {manifest.recipe.version}"
        )
    splits = manifest.recipe.splits
    counts = [list(manifest.splits), *(list(shard.rows) for shard in manifest.shards)]
    if any(found != list(splits) for found in counts):
        raise CorruptCacheError(f"other splits than {', '.join(splits)}; get the cache again")
    check_shards(manifest)
    if (part := manifest.part) and not 1 <= part.number <= part.count < 100_000:
        raise CorruptCacheError(f"part: {part.number} of {part.count} is no part")
    for split in splits:
        listed = sum(shard.rows[split] for shard in manifest.shards)
        if listed != manifest.splits[split].rows:
            raise CorruptCacheError(
                f"{listed} {split} rows in the shards, {manifest.splits[split].rows} in the totals"
            )
    return manifest


def check_shards(manifest: Manifest) -> None:
    """Hold what a manifest says of its shards to the limits of the format.

    Raises:
        CorruptCacheError: An entry or their sum is beyond them.
    """
    most_group_rows = rows_per_group(manifest.recipe.top_k, manifest.recipe.positions)
    if not manifest.shards:
        raise CorruptCacheError("shards: expected a list of at least one")
    for index, shard in enumerate(manifest.shards):
        where, expected = f"shards[{index}]", shard_name(index, len(manifest.shards))
        # Only this exact name is allowed, so no entry can point out of the folder.
        if shard.name != expected:
            raise CorruptCacheError(f"{where}: name {shard.name[:60]!r}, expected {expected!r}")
        total, group = shard.num_rows, shard.row_group_rows
        if not 1 <= total <= min(shard.bytes, MAX_ROWS):
            raise CorruptCacheError(f"{where}: {total} rows in {shard.bytes} bytes")
        if not 1 <= group <= most_group_rows or total // group > shard.bytes // _LEAST_GROUP_BYTES:
            raise CorruptCacheError(
                f"{where}: {total} rows in row groups of {group} and {shard.bytes} bytes, expected "
                f"groups of at most {most_group_rows} rows and at least {_LEAST_GROUP_BYTES} bytes"
            )
        if -(-total // group) > MAX_SHARD_ROW_GROUPS:
            raise CorruptCacheError(
                f"{where}: {total} rows in row groups of {group}, expected at most "
                f"{MAX_SHARD_ROW_GROUPS} groups"
            )
    groups = sum(-(-shard.num_rows // shard.row_group_rows) for shard in manifest.shards)
    if manifest.num_rows > MAX_ROWS or groups > MAX_ROW_GROUPS:
        raise CorruptCacheError(
            f"shards: {manifest.num_rows} rows in {groups} row groups, expected at most {MAX_ROWS} "
            f"in {MAX_ROW_GROUPS}"
        )


def shard_name(index: int, count: int) -> str:
    """Return the file name of shard `index` of `count`."""
    return f"{index:05d}-of-{count:05d}.parquet"


def check_pin(manifest: Manifest, pin: str | None, where: str | Path) -> None:
    """Refuse a cache that has another digest than the one it is pinned to.

    Raises:
        MismatchError: It has.
    """
    if pin not in (None, manifest.digest):
        raise MismatchError(
            f"{where}: this cache has digest {manifest.digest}, expected {pin}; "
            "name the cache that is meant, or change the digest"
        )


def split_pin(cache: str | Path) -> tuple[str, str | None]:
    """Split `PLACE@sha256:DIGEST` into place and digest; the digest is None where there is none.

    Raises:
        CacheError: What follows the `@sha256:` is not 64 hex digits.
    """
    text = str(cache)
    place, separator, digest = text.rpartition("@sha256:")
    if not separator:
        return text, None
    pin = f"sha256:{digest.lower()}"
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", pin):
        raise CacheError(f"{text}: the digest after @sha256: has to be 64 hex digits")
    return place, pin
