"""Disk to tensors: positions a second on one core, and resident memory over a large cache.

    python benchmarks/speed/bench_read.py [--gigabytes 1.0]

Writes caches of random signals (K = 100, float16) to a temporary folder: 10 MB and the size asked
for with 32 positions a row, and 10 MB with one position a row. Reads each in a process of its own
that has one core, and prints a table.

A position counts as read when its token ids stand in an int64 tensor and its logits in a float32
tensor, which is what the loss takes: `[P, K]` each, P positions of a row group. `groups` is the
first pass over a cache, every check of an untrusted cache included, sha256 of the bytes too.
`rows` asks for single rows in the trainer's order, as numpy arrays, for half a minute at most.
`peak` is the process's resident memory at its highest, `libraries` that before the cache is opened.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOP_K, VOCABULARY, SHARD_POSITIONS, ENTRY_BYTES = 100, 128_000, 65_536, 3.2


def shards_of(gigabytes: float) -> int:
    """Return how many shards make about so many bytes on disk."""
    return math.ceil(gigabytes * 1e9 / (SHARD_POSITIONS * TOP_K * ENTRY_BYTES))


def write_cache(
    folder: Path,
    shards: int,
    positions: int = 32,
    shard_positions: int = SHARD_POSITIONS,
    prompt_tokens: int = 48,
) -> None:
    """Write a cache of random signals, `positions` in each row."""
    from duet_unlearn.teacher_cache.format.manifest import Manifest
    from duet_unlearn.teacher_cache.format.recipe import Recipe
    from duet_unlearn.teacher_cache.format.schema import SPLITS
    from duet_unlearn.teacher_cache.format.shard import ShardHeader, write_shard
    from duet_unlearn.teacher_cache.format.statistics import SplitStatistics, rows_statistics

    sha = "sha256:" + "0" * 64
    recipe = Recipe(
        **dict.fromkeys(("weights", "config", "tokenizer", "vocabulary"), sha),
        vocab_size=VOCABULARY,
        chat_template=None,
        template_date="2024-07-26",
        prefix="none",
        prefix_place="raw",
        retain_prefix=True,
        top_k=TOP_K,
        positions=positions,
        logit_dtype="float16",
        compute_dtype="float32",
        eos_token_ids=(0,),
    )
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir(parents=True)
    engines = ({"engine": "random"},)
    entries, totals = [], {split: SplitStatistics() for split in SPLITS}
    for index in range(shards):
        rows = _rows(rng, index, positions, shard_positions, prompt_tokens)
        header = ShardHeader(recipe=recipe, queries=sha, index=index, count=shards, engines=engines)
        entries.append(write_shard(folder, rows, header))
        found = rows_statistics(rows, "float16")
        totals = {split: sums + found[split] for split, sums in totals.items()}
    Manifest(
        recipe=recipe,
        teacher="random",
        queries=sha,
        engines=engines,
        shards=tuple(entries),
        splits=totals,
        samples=(),
    ).write(folder)


def _rows(
    rng: np.random.Generator, shard: int, positions: int, shard_positions: int, prompt_tokens: int
) -> list:
    """Return the rows of a shard: distinct ids in random order, descending logits."""
    from duet_unlearn.teacher_cache.format.schema import CacheRow
    from duet_unlearn.teacher_cache.format.signal import Signal

    shape = (shard_positions, TOP_K)
    steps = rng.integers(1, VOCABULARY // TOP_K, shape, np.int32)
    ids = rng.permuted(steps.cumsum(axis=1, dtype=np.int32), axis=1)
    logits = 12 - np.sort(rng.gumbel(0, 2, shape).astype(np.float32), axis=1)
    logsumexp = np.log(np.exp(logits).sum(axis=1)) + np.float32(0.1)
    count = shard_positions // positions
    return [
        CacheRow(
            query_id=f"q{shard}-{number}",
            split="forget" if number < count // 2 else "retain",
            query=f"query {number} of shard {shard}",
            prompt_ids=np.arange(prompt_tokens, dtype=np.int32),
            signal=Signal(
                response_ids=ids[place, 0],
                token_ids=ids[place],
                logits=logits[place],
                logsumexp=logsumexp[place],
            ),
        )
        for number in range(count)
        for place in [slice(number * positions, (number + 1) * positions)]
    ]


def measure(folder: Path) -> None:
    """Read a cache on one core; print one JSON object."""
    import pyarrow
    import torch

    from duet_unlearn.distill.batches.sampler import epoch_order
    from duet_unlearn.teacher_cache.reader import CacheReader

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    torch.set_num_threads(1)
    libraries = peak_megabytes()
    reader = CacheReader.open(folder)
    started, positions = time.perf_counter(), 0
    for index in range(len(reader.row_groups)):
        group = reader.group(index)
        ids = torch.empty(group.token_ids.shape, dtype=torch.int64)
        logits = torch.empty(group.logits.shape, dtype=torch.float32)
        ids.copy_(torch.from_dlpack(group.token_ids))
        logits.copy_(torch.from_dlpack(group.logits))
        positions += len(ids)
    groups = positions / (time.perf_counter() - started)
    started, shuffled = time.perf_counter(), 0
    for row in epoch_order(reader.splits, reader.row_groups, seed=0, epoch=0).tolist():
        shuffled += len(reader.row(row).logits)
        if time.perf_counter() - started > 30:
            break
    result = {
        "gigabytes": reader.manifest.num_bytes / 1e9,
        "positions_a_row": reader.manifest.recipe.positions,
        "groups": groups,
        "rows": shuffled / (time.perf_counter() - started),
        "libraries": libraries,
        "peak": peak_megabytes(),
    }
    print(json.dumps(result))


def peak_megabytes() -> float:
    """Return the most resident memory of this process; of a child, not that of its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    print(
        "| cache | positions a row | groups, positions/s | rows, positions/s | libraries | peak |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for gigabytes, positions in ((0.01, 32), (arguments.gigabytes, 32), (0.01, 1)):
        with tempfile.TemporaryDirectory() as scratch:
            write_cache(Path(scratch), shards_of(gigabytes), positions)
            output = subprocess.run(
                [sys.executable, __file__, "--measure", scratch],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        found = json.loads(output)
        print(
            f"| {found['gigabytes']:.2f} GB | {found['positions_a_row']} | {found['groups']:,.0f} "
            f"| {found['rows']:,.0f} | {found['libraries']:.0f} MB "
            f"| {found['peak']:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
