"""`duet-cache push`, `pull` and `list`: share caches between teams."""

import json
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.paths import FolderPath

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.share.listing import ListedCache
    from duet_unlearn.teacher_cache.share.transfer import TransferResult

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.command("push")
@click.argument("cache")
@click.argument("url")
@click.option("--check", is_flag=True, help="Read back what is there; send damaged shards again.")
@_JSON
def push_command(cache: str, url: str, check: bool, as_json: bool) -> None:
    """Copy CACHE to URL: s3://BUCKET/NAME, hf://datasets/ORG/NAME, or a folder.

    The manifest goes last, so nobody sees half a cache. The same command goes on after a stop, and
    moves nothing that is there. Another cache at that URL is never replaced.
    """
    from duet_unlearn.teacher_cache.share.transfer import push

    _print_transfer(push(cache, url, check=check), as_json=as_json)


@click.command("pull")
@click.argument("url")
@click.argument("folder", metavar="DIR", type=FolderPath())
@_JSON
def pull_command(url: str, folder: str, as_json: bool) -> None:
    """Copy the cache at URL, or URL@sha256:DIGEST, into DIR.

    Every shard is checked by sha256 as it arrives. The same command goes on after a stop, and
    fetches damaged shards again.
    """
    from duet_unlearn.teacher_cache.share.transfer import pull

    _print_transfer(pull(url, folder), as_json=as_json)


def _print_transfer(result: "TransferResult", *, as_json: bool) -> None:
    manifest = result.manifest
    if as_json:
        document = {
            "place": result.place,
            "digest": manifest.digest,
            "hit": result.hit,
            "rows": manifest.num_rows,
            "shards": len(manifest.shards),
            "bytes": manifest.num_bytes,
            "moved_shards": result.moved_shards,
            "moved_bytes": result.moved_bytes,
        }
        click.echo(json.dumps(document, indent=2))
        return
    done = (
        "already there"
        if result.hit
        else f"{result.moved_shards} of {len(manifest.shards)} shard(s) moved, "
        f"{result.moved_bytes} bytes"
    )
    click.echo(f"{result.place}: {manifest.num_rows} rows, {done}")
    click.echo(f"pin it as {result.place}@{manifest.digest}")


@click.command("list")
@click.argument("url")
@_JSON
def list_command(url: str, as_json: bool) -> None:
    """List the caches at and below URL, a folder works too.

    A web server has no listing: give it the URL of one cache.
    """
    from duet_unlearn.teacher_cache.inspect import printable
    from duet_unlearn.teacher_cache.share.listing import list_caches

    caches = list_caches(url)
    if as_json:
        click.echo(json.dumps([_listed(cache) for cache in caches], indent=2, ensure_ascii=False))
        return
    if not caches:
        click.echo(f"{url}: no teacher cache at or below it", err=True)
    for cache in caches:
        if cache.manifest is None:
            click.echo(f"{cache.name}\n    damaged: {printable(str(cache.problem))}")
            continue
        manifest = cache.manifest
        click.echo(
            f"{printable(cache.name)}\n"
            f"    {manifest.digest}\n"
            f"    {printable(manifest.teacher)}, {manifest.num_rows} rows, "
            f"{manifest.num_bytes} bytes, Top-{manifest.recipe.top_k}, "
            f"{manifest.recipe.positions} position(s)\n"
            f'    prefix "{printable(manifest.recipe.prefix)}"'
        )


def _listed(cache: "ListedCache") -> dict[str, Any]:
    manifest = cache.manifest
    return {
        "name": cache.name,
        "url": cache.url,
        "digest": manifest.digest if manifest else None,
        "teacher": manifest.teacher if manifest else None,
        "prefix": manifest.recipe.prefix if manifest else None,
        "top_k": manifest.recipe.top_k if manifest else None,
        "positions": manifest.recipe.positions if manifest else None,
        "rows": manifest.num_rows if manifest else None,
        "bytes": manifest.num_bytes if manifest else None,
        "problem": cache.problem,
    }
