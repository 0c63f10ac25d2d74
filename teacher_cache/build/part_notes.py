"""What a part of a build leaves for `finish`: where its tokenizer is, and how it was started.

Shards carry all that decides a cache. These notes only spare the user typing; without them
`finish` asks for `--teacher`. They are files whose names begin with a dot, no part of the cache.
"""

import json
import logging
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from duet_unlearn.data.models.folder import model_name
from duet_unlearn.teacher_cache.build.config import BuildConfig, command_of
from duet_unlearn.files import write_text
from duet_unlearn.teacher_cache.build.lock import part_name
from duet_unlearn.teacher_cache.build.parts import Part

logger = logging.getLogger(__name__)

_SUFFIX = ".json"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PartNotes:
    """The notes of one part."""

    teacher: str
    """The model as the build named it; a folder by its whole path."""
    name: str
    """The teacher's name as the manifest gives it."""
    parts: int
    """Number of parts."""
    command: str
    """What builds the cache, but for `--shards`."""


def write_notes(config: BuildConfig, part: Part) -> None:
    """Write the notes of a part beside its lock.

    Raises:
        CacheError: The folder cannot be written.
    """
    folder = Path(config.teacher).expanduser()
    notes = PartNotes(
        teacher=str(folder.resolve()) if folder.exists() else config.teacher,
        name=model_name(config.teacher),
        parts=part.count,
        command=shlex.join(command_of(config)),
    )
    write_text(config.out / part_name(part, _SUFFIX), json.dumps(asdict(notes)))


def read_notes(cache: Path) -> PartNotes | None:
    """Return the newest notes that some part left, None where there are none."""
    paths = [path for path in cache.glob(f".part-*{_SUFFIX}") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            if path.stat().st_size <= _MOST_BYTES:
                return _checked(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.debug("%s: not readable (%s)", path, error)
    return None


def _checked(value: dict[str, object]) -> PartNotes:
    parts = value["parts"]
    if type(parts) is not int or parts < 1:
        raise ValueError(f"parts is {parts!r}")
    return PartNotes(
        teacher=str(value["teacher"]),
        name=str(value["name"]),
        parts=parts,
        command=str(value["command"]),
    )
