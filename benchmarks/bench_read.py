"""Disk to tensors: positions a second on one core, and resident memory over a large cache.

    python benchmarks/bench_read.py [--gigabytes 1.0]

Writes two caches of random signals (K = 100, 32 positions a row) to a temporary folder: one of
about 10 MB and one of the size asked for. Reads each in a process of its own, row groups to
tensors and then rows in the trainer's shuffled order, and prints a table.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOP_K, POSITIONS, VOCABULARY, SHARD_ROWS = 100, 32, 128_000, 2048


def write_cache(folder: Path, gigabytes: float) -> None:
    """Write a cache of random signals of about that size on disk."""
    from duet_unlearn.teacher_cache.manifest import Manifest
    from duet_unlearn.teacher_cache.recipe import Recipe
    from duet_unlearn.teacher_cache.schema import SPLITS, CacheRow
    from duet_unlearn.teacher_cache.shards import ShardHeader, write_shard
    from duet_unlearn.teacher_cache.signals import Signal
    from duet_unlearn.teacher_cache.statistics import SplitStatistics, rows_statistics

    sha = "sha256:" + "0" * 64
    recipe = Recipe(
        weights=sha,
        config=sha,
        tokenizer=sha,
        vocabulary=sha,
        vocab_size=VOCABULARY,
        chat_template=None,
        template_date="2024-07-26",
        prefix="none",
        prefix_place="raw",
        retain_prefix=True,
        top_k=TOP_K,
        positions=POSITIONS,
        logit_dtype="float16",
        compute_dtype="float32",
        eos_token_ids=(0,),
    )
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir(parents=True)
    bytes_a_row = POSITIONS * TOP_K * 3.4
    count = max(1, round(gigabytes * 1e9 / bytes_a_row / SHARD_ROWS))
    entries, totals = [], {split: SplitStatistics() for split in SPLITS}
    for index in range(count):
        rows = []
        for number in range(SHARD_ROWS):
            logits = rng.gumbel(0, 2, (POSITIONS, TOP_K)).astype(np.float32)
            logits = 12 - np.sort(-logits, axis=1)
            # Distinct ids without the cost of a permutation: an arithmetic walk mod a prime.
            start, step = rng.integers(1, 127_000, (2, POSITIONS, 1))
            ids = (start + step * np.arange(TOP_K)) % 127_997
            signal = Signal(
                response_ids=ids[:, 0].astype(np.int32),
                token_ids=ids.astype(np.int32),
                logits=logits,
                logsumexp=(logits.max(axis=1) + 1).astype(np.float32),
            )
            rows.append(
                CacheRow(
                    query_id=f"q{index}-{number}",
                    split="forget" if number < SHARD_ROWS // 2 else "retain",
                    query=f"query {number} of shard {index}",
                    prompt_ids=np.arange(48, dtype=np.int32),
                    signal=signal,
                )
            )
        header = ShardHeader(
            recipe=recipe, queries=sha, index=index, count=count, engines=({"engine": "random"},)
        )
        entries.append(write_shard(folder, rows, header))
        for split, sums in rows_statistics(rows).items():
            totals[split] += sums
    Manifest(
        recipe=recipe,
        teacher="random",
        queries=sha,
        engines=({"engine": "random"},),
        shards=tuple(entries),
        splits=totals,
        samples=(),
    ).write(folder)


def measure(folder: Path) -> None:
    """Read a cache on one core; print one JSON object."""
    import pyarrow
    import torch

    from duet_unlearn.distill.sampler import epoch_order
    from duet_unlearn.teacher_cache.reader import CacheReader

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    torch.set_num_threads(1)
    reader = CacheReader.open(folder)
    started, positions = time.perf_counter(), 0
    for index in range(len(reader.row_groups)):
        group = reader.group(index)
        logits = torch.tensor(group.logits, dtype=torch.float32)
        ids = torch.tensor(group.token_ids, dtype=torch.int64)
        positions += logits.shape[0]
        del logits, ids
    groups_s = time.perf_counter() - started
    started, shuffled = time.perf_counter(), 0
    for row in epoch_order(reader.splits, reader.row_groups, seed=0, epoch=0).tolist():
        shuffled += len(reader.row(row).logits)
        if time.perf_counter() - started > 60:
            break
    rows_s = time.perf_counter() - started
    result = {
        "gigabytes": reader.manifest.num_bytes / 1e9,
        "bytes_an_entry": reader.manifest.num_bytes / positions / TOP_K,
        "positions_a_second": positions / groups_s,
        "shuffled_positions_a_second": shuffled / rows_s,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result))


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    print(f"{'cache':>9} {'B/entry':>8} {'positions/s':>12} {'shuffled/s':>12} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        for gigabytes in (0.01, arguments.gigabytes):
            folder = Path(scratch) / str(gigabytes)
            write_cache(folder, gigabytes)
            output = subprocess.run(
                [sys.executable, __file__, "--measure", str(folder)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            found = json.loads(output)
            print(
                f"{found['gigabytes']:>6.2f} GB {found['bytes_an_entry']:>8.2f} "
                f"{found['positions_a_second']:>12,.0f} "
                f"{found['shuffled_positions_a_second']:>12,.0f} {found['peak_memory_mb']:>8.0f}"
            )


if __name__ == "__main__":
    main()
