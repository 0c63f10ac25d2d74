"""What the commands that make a cache say of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.format.manifest import Manifest


def print_cache(
    cache: str | Path,
    manifest: "Manifest",
    *,
    hit: bool,
    done: str,
    counts: Mapping[str, int],
    as_json: bool,
) -> None:
    """Print a finished cache and the pin under which others can name it.

    Args:
        cache: Its folder or URL.
        manifest: Its manifest.
        hit: Whether it was there already and nothing was done.
        done: What was done, for people.
        counts: What was done, for the JSON document.
        as_json: Print that document instead of text.
    """
    if as_json:
        document = {
            "cache": str(cache),
            "digest": manifest.digest,
            "hit": hit,
            "rows": manifest.num_rows,
            **counts,
            "shards": len(manifest.shards),
            "bytes": manifest.num_bytes,
        }
        click.echo(json.dumps(document, indent=2))
        return
    splits = ", ".join(f"{sums.rows} {split}" for split, sums in manifest.splits.items())
    how = "found finished" if hit else done
    click.echo(f"{cache}: {splits} ({how}), {manifest.num_bytes} bytes")
    click.echo(f"pin it as {cache}@{manifest.digest}")
