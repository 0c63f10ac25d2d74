"""From the command to the first optimizer step on the demo world, and where the time goes.

    python benchmarks/unlearning/bench_first_step.py [--rounds 5]

Runs `duet-distill run` in a fresh process each time, on a finished cache of the demo world, with a
clock at the borders of its stages. Prints medians in seconds, and beside them what importing the
libraries takes in a process that does nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo_students import build_cache

from duet_unlearn.data import demo_world as world

# Runs the command as the shell would, and notes the time when a function is first reached. The
# functions are those that `distill/run.py` calls in this order.
_COMMAND = """
import functools, json, sys, time
started = float(sys.argv.pop(1))
marks = {}
def mark(name):
    marks.setdefault(name, time.time() - started)
def before(owner, attribute, name):
    plain = getattr(owner, attribute)
    def noted(*args, **kwargs):
        mark(name)
        return plain(*args, **kwargs)
    setattr(owner, attribute, noted)
from duet_unlearn.cli.distill import main
from duet_unlearn.distill import run
mark("command line")
before(run, "check_cache_fits", "first libraries, tokenizer")
before(run, "_wait_for_all", "fits the cache, settings of the Trainer")
before(run, "load_model", "work folder")
before(run, "_make_trainer", "weights, and their model's code")
class FirstStep(Exception): pass
plain = run._make_trainer
def make_trainer(*args, **kwargs):
    from transformers import TrainerCallback
    trainer = plain(*args, **kwargs)
    mark("Trainer, and its code")
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            mark("first step")
            print(json.dumps(marks))
            raise FirstStep
    trainer.add_callback(Stop)
    return trainer
run._make_trainer = make_trainer
before(run, "resolve_job", "imports of the command")
resolve = run.resolve_job
def resolved(*args, **kwargs):
    job = resolve(*args, **kwargs)
    mark("what the run is")
    return job
run.resolve_job = resolved
try:
    main(standalone_mode=False)
except FirstStep:
    pass
"""

_IMPORTS = {
    "torch": "import torch",
    "transformers' Trainer and Llama": (
        "from transformers import Trainer, LlamaForCausalLM, PreTrainedTokenizerFast"
    ),
}


def first_step(cache: Path, out: Path) -> dict[str, float]:
    """Return the seconds after the start at which each stage ended."""
    command = ["run", str(cache), "--student", str(world.MODEL), "--out", str(out), "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, str(time.time()), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout.strip():
        raise SystemExit(done.stderr)
    ends: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return ends


def import_alone(statement: str) -> float:
    """Return the seconds that a process takes which imports and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Start the command some times and print the median of each stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache")
        runs = [first_step(cache, Path(scratch) / f"out-{number}") for number in range(rounds + 1)]
    print("| stage | seconds |")
    print("| --- | ---: |")
    previous = dict.fromkeys(range(rounds), 0.0)
    for stage in sorted(runs[0], key=runs[0].__getitem__):
        ends = [run[stage] for run in runs[1:]]  # the first one fills the caches of the disk
        spent = [end - previous[number] for number, end in enumerate(ends)]
        print(f"| {stage} | {statistics.median(spent):.2f} |")
        previous = dict(enumerate(ends))
    print(f"| **all** | **{statistics.median(previous.values()):.2f}** |")
    for name, statement in _IMPORTS.items():
        seconds = statistics.median(import_alone(statement) for _ in range(rounds))
        print(f"| import of {name} alone | {seconds:.2f} |")


if __name__ == "__main__":
    main()
