"""What a cache of many positions takes: arithmetic on what bench_scale.py found.

    python benchmarks/speed/scale_costs.py OUT/100000 TINY/1000000 TINY/10000000 [--positions 1e10]

Bytes on disk are those of the first study's cache, K = 16. Rates are of what a command took more
for the third study than for the second, so that its start is left out. Bytes of memory are counted
here, of the objects that `build` holds of each position, and `verify` and `merge` of each row. The
rest is multiplied. The teacher's hours are 2 x parameters x tokens / (peak FLOP/s x utilisation):
two operations a parameter and token, attention left out, and the utilisation is an assumption.
"""

import argparse
import json
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from bench_scale import ROW, TOP_K, write_documents

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, fingerprint_hashes, hash_row
from duet_unlearn.teacher_cache.build.config import BuildConfig, make_recipe
from duet_unlearn.teacher_cache.build.inputs import load_query_set
from duet_unlearn.teacher_cache.build.plan import MOST_SHARDS
from duet_unlearn.teacher_cache.build.responses import cut_given
from duet_unlearn.teacher_cache.format.manifest import ShardEntry, shard_name
from duet_unlearn.teacher_cache.format.row_group import text_key
from duet_unlearn.teacher_cache.merge import _Selection

COUNTED, CONTEXT = 100_000, 1024
GIGABIT = 1e9 / 8


def entry_bytes(cache: Path) -> float:
    """Return the bytes that a token id with its logit takes on disk."""
    size = values = 0
    for path in (cache / "shards").iterdir():
        footer = pq.read_metadata(path)
        for group in map(footer.row_group, range(footer.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema.split(".")[0] in ("token_ids", "logits"):
                    size += column.total_compressed_size
                    values += column.num_values
    return 2 * size / values


def held(make: Callable[[], object]) -> int:
    """Return the most bytes that making something takes."""
    tracemalloc.start()
    made = make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del made
    return peak


def identities() -> Iterator[tuple[str, str, str]]:
    """Yield rows of documents, without their texts."""
    for number in range(COUNTED):
        yield f"document-{number:09d}@{ROW}", "train", f"{number}"


class Scanned:
    """What `merge` sees of its sources."""

    def scan(self) -> Iterator[tuple[tuple[int, int], tuple[str, str, str]]]:
        """Yield place and identity of every row."""
        for number, identity in enumerate(identities()):
            yield (number % 7, number), identity


def merged() -> object:
    """Return what `merge` holds before it writes."""
    selection = _Selection()
    source: Any = Scanned()
    return selection, fingerprint_hashes(map(hash_row, selection.add_all(source)))


def verified() -> object:
    """Return what `verify` holds at its end."""
    hashes = [hash_row(row) for row in identities()]
    ids = {text_key(split, query_id) for query_id, split, _ in identities()}
    return hashes, ids, fingerprint_hashes(hashes)


def bytes_of_documents(positions: int) -> float:
    """Return the bytes that a build holds of each position."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.jsonl"
        write_documents(path, world.MODEL / "tokenizer.json", positions)
        config = BuildConfig(
            teacher=str(world.MODEL),
            prefix=None,
            responses=(str(path),),
            out=Path(scratch) / "out",
            positions=ROW,
            engine="transformers",
        )
        tokenizer, recipe = load_tokenizer(world.MODEL), make_recipe(config, world.MODEL)
        renderer, rows = PromptRenderer(tokenizer), list[Query]()
        peak = held(
            lambda: rows.extend(
                cut_given(load_query_set(config), renderer, tokenizer, recipe, CONTEXT)
            )
        )
        return peak / sum(len(row.given.response_ids) for row in rows if row.given)


def manifest_bytes(shards: int, shard_rows: int) -> int:
    """Return what the entries of so many shards take in a manifest."""
    entry = ShardEntry(
        name=shard_name(shards - 1, shards),
        rows={"forget": 0, "retain": 0, "train": shard_rows},
        row_group_rows=64,
        bytes=50_000_000,
        sha256="sha256:" + "0" * 64,
    )
    one, two = (len(json.dumps({"shards": [asdict(entry)] * n}, indent=2)) for n in (1, 2))
    return shards * (two - one)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="What bench_scale.py left of one size.")
    parser.add_argument("small", type=Path)
    parser.add_argument("large", type=Path)
    parser.add_argument("--positions", type=float, default=1e10)
    parser.add_argument("--parameters", type=float, default=8e9)
    parser.add_argument("--flops", type=float, default=989e12, help="Peak; bfloat16 on an H100.")
    parser.add_argument("--utilisation", type=float, default=0.4)
    given = parser.parse_args()
    studies = (given.study, given.small, given.large)
    found, small, large = (json.loads((f / "figures.json").read_text()) for f in studies)
    count, rows, entry = given.positions, given.positions / ROW, entry_bytes(given.study / "cache")
    other = found["stored"]["bytes a position"] - TOP_K * entry
    each = {top_k: other + top_k * entry for top_k in (16, 50, 100)}
    print(
        f"{count:.0e} positions in {rows:.0e} rows of {ROW}; {entry:.2f} bytes an entry, ", end=""
    )
    print(f"{other:.1f} a position beside them\n")
    print("| K | bytes a position | TB | hours at 1 Gbit/s | at 10 Gbit/s |")
    print(f"| ---: |{' ---: |' * 4}")
    for top_k, size in each.items():
        hours = size * count / GIGABIT / 3600
        cells = (f"{size:.0f}", f"{size * count / 1e12:.2f}", f"{hours:.1f}", f"{hours / 10:.2f}")
        print(f"| {top_k} | {' | '.join(cells)} |")
    print("\n| shard rows | shards | MB a shard, K = 16 | K = 100 | manifest, MB |")
    print(f"| ---: |{' ---: |' * 4}")
    for shard_rows in (64, 256, 1024):
        shards = int(-(-rows // shard_rows))
        sizes = (f"{shard_rows * ROW * each[top_k] / 1e6:.0f}" for top_k in (16, 100))
        manifest = f"{manifest_bytes(shards, shard_rows) / 1e6:.1f}"
        manifest += " (refused)" if shards > MOST_SHARDS else ""
        print(f"| {shard_rows} | {shards:,} | {' | '.join(sizes)} | {manifest} |")
    operations = 2 * given.parameters * count
    hours = operations / (given.flops * given.utilisation) / 3600
    print(
        f"\nteacher: 2 x {given.parameters:.1e} x {count:.0e} = {operations:.1e} operations; at "
        f"{given.utilisation:.0%} of {given.flops:.3g} FLOP/s {hours:.0f} GPU hours"
    )
    for name, make in (("verify", verified), ("merge", merged)):
        a_row, more = held(make) / COUNTED, large[name]["s"] - small[name]["s"]
        rate = (large["stored"]["positions"] - small["stored"]["positions"]) / more
        print(
            f"{name}: {rate:,.0f} positions a processor second, so {count / rate / 3600:.1f} hours "
            f"of one; {a_row:.0f} bytes a row, so {a_row * rows / 1e9:.1f} GB for the rows"
        )
    a_position = bytes_of_documents(200_000)
    print(
        f"build: {a_position:.1f} bytes a position, so {a_position / 10:.1f} GB of memory for the "
        f"documents of 1e8 positions and {a_position * count / 1e9:.0f} GB for all"
    )


if __name__ == "__main__":
    main()
