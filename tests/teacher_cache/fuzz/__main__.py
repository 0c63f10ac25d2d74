"""Mutated caches yield our own errors and nothing else: no crash, no hang, no large allocation.

    python tests/teacher_cache/fuzz [--inputs 10000] [--first 0] [--workers N]

Every input is one number, which seeds one mutation of a manifest, a shard's bytes, footer, pages or
values. They run in a process of their own with limits on memory and time, so that a crash of the
Parquet library, a hang or a huge allocation shows; after a crash, another process goes on. A
forger's mutations come with fitting hashes: only then do they get past the manifest.

Prints totals as JSON and exits with 1 if any input did anything but be refused or accepted.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

INPUTS = Path(__file__).with_name("inputs.py")
CHUNK = 100
"""Inputs of one process; starting it costs about as much as ten of them."""
Outcomes = dict[str, dict[str, int]]
Failures = list[dict[str, Any]]


def run(first: int, count: int, workers: int = 1) -> dict[str, Any]:
    """Run some inputs; return how many were refused and accepted, and what the others did."""
    bounds = [*range(first, first + count, CHUNK), first + count]
    outcomes: Outcomes = {}
    failures: Failures = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=count, unit="input") as bar:
        for chunk, (own, failed) in zip(
            itertools.pairwise(bounds),
            pool.map(_run_chunk, bounds[:-1], bounds[1:]),
            strict=True,
        ):
            for mutation, counts in own.items():
                total = outcomes.setdefault(mutation, dict.fromkeys(counts, 0))
                for outcome, times in counts.items():
                    total[outcome] += times
            failures += failed
            bar.update(chunk[1] - chunk[0])
            bar.set_postfix(failed=len(failures))
    return {
        "inputs": count,
        **{
            outcome: sum(counts[outcome] for counts in outcomes.values())
            for outcome in ("refused", "accepted")
        },
        "failed": len(failures),
        "by_mutation": dict(sorted(outcomes.items())),
        "failures": failures,
    }


def _run_chunk(number: int, stop: int) -> tuple[Outcomes, Failures]:
    """Run inputs, in one process after another where some end early."""
    outcomes: Outcomes = {}
    failures: Failures = []
    while number < stop:
        number = _run_process(number, stop, outcomes, failures)
    return outcomes, failures


def _run_process(number: int, stop: int, outcomes: Outcomes, failures: Failures) -> int:
    """Run inputs until the process ends; return the first one that it did not get to."""
    with subprocess.Popen(
        [sys.executable, str(INPUTS), str(number), str(stop - number)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        running = False
        for report in map(json.loads, process.stdout):
            if "input" in report:
                number, running = report["input"], True
                continue
            running = False
            number += 1
            if report["outcome"] == "failed":
                failures.append({"input": number - 1, "why": report["why"]})
            else:
                counts = outcomes.setdefault(report["mutation"], {"refused": 0, "accepted": 0})
                counts[report["outcome"]] += 1
    if running:
        failures.append({"input": number, "why": f"the process ended: {process.returncode}"})
        return number + 1
    if number < stop:
        raise RuntimeError(f"no input could be run: exit {process.returncode}")
    return number


def main() -> int:
    """Run, print, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    totals = run(arguments.first, arguments.inputs, arguments.workers)
    print(json.dumps(totals, indent=1))
    return 1 if totals["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
