"""`duet-cache push`, `pull` and `list`: share caches between teams."""

from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.options import FolderPath
from duet_unlearn.cli.output import json_option, print_cache, print_json
from duet_unlearn.urls import redact_url, visible

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.share.place import ListedCache
    from duet_unlearn.teacher_cache.share.transfer import TransferResult


@click.command("push")
@click.argument("cache")
@click.argument("url")
@click.option("--check", is_flag=True, help="Read back what is there; send damaged shards again.")
@json_option
def push_command(cache: str, url: str, check: bool, as_json: bool) -> None:
    """Copy CACHE to URL: s3://BUCKET/NAME, hf://datasets/ORG/NAME, or a folder.

    The manifest goes last, so nobody sees half a cache. The same command resumes after a stop, and
    moves nothing that is there. Another cache, or any other file, at that URL is never replaced.
    """
    from duet_unlearn.teacher_cache.share.transfer import push

    _print_transfer(push(cache, url, check=check), as_json=as_json)


@click.command("pull")
@click.argument("url")
@click.argument("folder", metavar="DIR", type=FolderPath())
@json_option
def pull_command(url: str, folder: str, as_json: bool) -> None:
    """Copy the cache at URL, or URL@sha256:DIGEST, into DIR.

    Every shard is checked by sha256 before it gets its name. The same command resumes after a stop,
    and fetches damaged shards again.
    """
    from duet_unlearn.teacher_cache.share.transfer import pull

    _print_transfer(pull(url, folder), as_json=as_json)


def _print_transfer(result: "TransferResult", *, as_json: bool) -> None:
    manifest = result.manifest
    print_cache(
        result.place,
        manifest,
        hit=result.hit,
        done=f"{result.moved_shards} of {len(manifest.shards)} shard(s) moved, "
        f"{result.moved_bytes} bytes",
        counts={"moved_shards": result.moved_shards, "moved_bytes": result.moved_bytes},
        as_json=as_json,
    )


@click.command("list")
@click.argument("url")
@json_option
def list_command(url: str, as_json: bool) -> None:
    """List the caches at and below URL, a folder works too.

    A web server has no listing: give it the URL of one cache.
    """
    from duet_unlearn.teacher_cache.share.place import list_caches

    caches = list_caches(url)
    if as_json:
        print_json([_listed(cache) for cache in caches])
        return
    if not caches:
        click.echo(f"{redact_url(url)}: no teacher cache at or below it", err=True)
    for cache in caches:
        if cache.manifest is None:
            click.echo(f"{visible(cache.name)}\n    damaged: {visible(str(cache.problem))}")
            continue
        manifest = cache.manifest
        click.echo(
            f"{visible(cache.name)}\n"
            f"    {manifest.digest}\n"
            f"    {visible(manifest.teacher)}, {manifest.num_rows} rows, "
            f"{manifest.num_bytes} bytes, Top-{manifest.recipe.top_k}, "
            f"{manifest.recipe.positions} position(s)\n"
            f'    prefix "{visible(manifest.recipe.prefix)}"'
        )


def _listed(cache: "ListedCache") -> dict[str, Any]:
    document: dict[str, Any] = {"name": cache.name, "url": cache.url, "problem": cache.problem}
    if (manifest := cache.manifest) is not None:
        document |= {
            "digest": manifest.digest,
            "teacher": manifest.teacher,
            "prefix": manifest.recipe.prefix,
            "top_k": manifest.recipe.top_k,
            "positions": manifest.recipe.positions,
            "rows": manifest.num_rows,
            "bytes": manifest.num_bytes,
        }
    return document
