"""Processor time of commands that a person waits for: help, and a look at a cache.

    python benchmarks/speed/bench_start.py [--runs 5]

Runs each command in a process of its own and prints its processor time, user and system together,
the least of some runs. Wall time is left out: it depends on what else the machine does.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_read import write_cache

COMMAND = "import sys; from duet_unlearn.cli.{} import main; sys.argv[0] = '{}'; main()"


def processor_seconds(program: str, arguments: list[str]) -> float:
    """Run a command to its end; return the seconds of processor time that it took.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    code = COMMAND.format("cache" if program == "duet-cache" else "distill", program)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Write two caches, run the commands, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch) / "one-shard", Path(scratch) / "twelve-shards"
        write_cache(small, shards=1, shard_positions=256)
        write_cache(large, shards=12, shard_positions=16_384)
        commands = {
            "duet-cache --help": ("duet-cache", ["--help"]),
            "duet-distill --help": ("duet-distill", ["--help"]),
            "duet-cache inspect, 1 shard": ("duet-cache", ["inspect", str(small)]),
            "duet-cache inspect, 12 shards": ("duet-cache", ["inspect", str(large)]),
        }
        print("| command | processor time |\n| --- | --- |")
        for name, (program, arguments) in commands.items():
            seconds = min(processor_seconds(program, arguments) for _ in range(runs))
            print(f"| `{name}` | {seconds:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
