"""What a cache is: recipe, sizes, what the Top-K covers, and what the prefix did to a query.

Everything comes from the manifest, so it costs the same for any size of cache.
"""

from pathlib import Path
from typing import Any

from duet_unlearn.teacher_cache.format.schema import COUNTS
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.urls import redact_url, visible

_BAR_WIDTH = 24


def summarize(cache: str | Path) -> dict[str, Any]:
    """Return a cache's summary as JSON values; see `render_summary` for the same in words.

    Raises:
        CacheError: There is no finished cache there, or it is damaged.
        MismatchError: It has another digest than the one given.
    """
    manifest = CacheReader.open(cache).manifest
    positions = sum(sums.positions for sums in manifest.splits.values())
    return {
        "cache": redact_url(str(cache)),
        "digest": manifest.digest,
        "teacher": manifest.teacher,
        "recipe": manifest.recipe.to_json(),
        "recipe_id": manifest.recipe_id,
        "engines": list(manifest.engines),
        "shards": len(manifest.shards),
        "bytes": manifest.num_bytes,
        "bytes_per_position": manifest.num_bytes / max(1, positions),
        "bytes_per_logit": manifest.num_bytes / max(1, positions * manifest.recipe.top_k)
        if COUNTS not in manifest.recipe.columns
        else None,
        "splits": {
            split: {
                "rows": sums.rows,
                "positions": sums.positions,
                "mean_top_k_mass": sums.mass / max(1, sums.positions),
                "mean_entropy_nats": sums.entropy / max(1, sums.positions),
            }
            for split, sums in manifest.splits.items()
        },
        "samples": list(manifest.samples),
        "check": manifest.check,
    }


def render_summary(summary: dict[str, Any]) -> str:
    """Return the summary as text for a terminal of 80 columns or more."""
    recipe = summary["recipe"]
    steered = "forget and retain" if recipe["retain_prefix"] else "forget"
    prefix = ["prefix    none"]
    if recipe["prefix"]:
        prefix = [f'prefix    "{recipe["prefix"]}"']
        prefix.append(f"          at {recipe['prefix_place']}, in front of {steered} queries")
    if "strength" in recipe:
        prefix.append(f"          forget rows moved {recipe['strength']:g} further from the base")
    if "temperature" in recipe:
        sampled = f"{recipe['temperature']:g}, seed {recipe.get('seed', 0)}"
        prefix.append(f"sampled   the answers to train queries, at temperature {sampled}")
    engines = ", ".join(_engine(engine) for engine in summary["engines"])
    most = f"Top-{recipe['top_k']}"
    if "keep" in recipe:
        most = f"what {recipe['top_k']} draws a position find"
    elif "top_p" in recipe:
        most = f"the fewest of the {most} that hold {recipe['top_p']:g} of the mass"
    if summary["bytes_per_logit"] is None:
        each = f"{summary['bytes_per_position']:.0f} bytes a position"
    else:
        each = f"{summary['bytes_per_logit']:.2f} bytes a logit"
    lines = [
        f"cache     {summary['cache']}",
        f"digest    {summary['digest']}",
        f"teacher   {summary['teacher']}, {recipe['compute_dtype']}, by {engines or 'unknown'}",
        *prefix,
        f"recipe    {summary['recipe_id'][:19]}..., {most}, "
        f"{recipe['positions']} position(s), {recipe['logit_dtype']} logits",
        f"size      {summary['shards']} shard(s), {_bytes(summary['bytes'])}, " + each,
        "",
        f"{'split':<10}{'queries':>10}{'positions':>12}{'Top-K mass':>12}{'entropy':>10}",
    ]
    for split, values in summary["splits"].items():
        lines.append(
            f"{split:<10}{values['rows']:>10}{values['positions']:>12}"
            f"{values['mean_top_k_mass']:>12.4f}{values['mean_entropy_nats']:>10.3f}"
        )
    if summary["check"] is not None:
        lines += ["", "the teacher on a sample of the queries"]
        lines += [f"  {name:<32}{value:>10}" for name, value in summary["check"].items()]
    for split in summary["splits"]:
        sample = next((s for s in summary["samples"] if s.get("split") == split), None)
        if sample is not None:
            lines += ["", *_render_sample(sample, "keep" in recipe)]
    return "\n".join(visible(line) for line in lines)


def _engine(description: dict[str, Any]) -> str:
    """Return an engine's name and its own version."""
    name, versions = str(description.get("engine", "?")), description.get("versions")
    version = versions.get(name, "") if isinstance(versions, dict) else ""
    return f"{name} {version}".strip()


def _render_sample(sample: dict[str, Any], is_sampled: bool) -> list[str]:
    found = "tokens drawn most often, ln of how often" if is_sampled else "strongest tokens"
    lines = [f"the teacher's {found}, {sample.get('split')}: {sample.get('query')}"]
    for token in sample.get("strongest", [])[:10]:
        probability = float(token.get("probability", 0.0))
        bar = "#" * round(min(max(probability, 0.0), 1.0) * _BAR_WIDTH)
        text = repr(str(token.get("text")))
        lines.append(f"  {token.get('logit'):>9.3f} {probability:>8.4f}  {text:<24.24} {bar}")
    return lines


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
