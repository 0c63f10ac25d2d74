"""Hold `duet-distill plan` against the run that it plans: predicted by measured.

    python benchmarks/speed/bench_plan.py [MODEL CACHE] [--measure 3] [--steps N]

Without a MODEL and its CACHE: the demo world's, everything trained and then LoRA of rank 16. The
run is a process of its own, timed from its start to its end.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from duet_unlearn import build_cache
from duet_unlearn.data import demo_world as world
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.plan import plan
from duet_unlearn.distill.plan_config import PlanConfig
from duet_unlearn.distill.run import run


def compare(scratch: Path, what: str, measure: int, **settings: Any) -> None:
    """Plan a run, do it, and print a row for each figure."""
    planned = plan(PlanConfig(**settings, measure=measure))
    measured = planned.measured
    assert measured is not None
    started = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        config = RunConfig(**settings, out=str(scratch / what.replace(" ", "-")))
        result = pool.submit(run, config).result()
    seconds = time.perf_counter() - started
    stored = sum(f.stat().st_size for f in Path(result.out).glob("*.safetensors"))
    rows = (
        ("steps", planned.steps, result.steps, "{:.0f}"),
        ("a step, s", measured.step_seconds, result.step_seconds, "{:.4f}"),
        ("the whole run, s", measured.run_seconds, seconds, "{:.1f}"),
        ("peak memory, MiB: tried", measured.peak_memory_bytes / 2**20, None, "{:.1f}"),
        ("peak memory, MiB: estimated", planned.memory["sum"] / 2**20, None, "{:.1f}"),
        ("student, MiB", planned.disk["student"] / 2**20, stored / 2**20, "{:.2f}"),
    )
    for name, predicted, found, shape in rows:
        value = result.peak_memory_bytes / 2**20 if found is None else found
        print(
            f"| {what} | {name} | {shape.format(predicted)} | {shape.format(value)} | "
            f"{predicted / value:.2f} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("cache", nargs="?")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--measure", type=int, default=3, help="Steps that plan times.")
    parser.add_argument("--steps", type=int, help="Stop after these many.  [default: the run's]")
    arguments = parser.parse_args()
    if arguments.model and not arguments.cache:
        parser.error("a MODEL needs its CACHE")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does
    print("| trained | | predicted | measured | ratio |")
    print("| --- | --- | ---: | ---: | ---: |", flush=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, cache = arguments.model, arguments.cache
        if model is None:
            model, cache = str(world.MODEL), str(scratch / "cache")
            build_cache(
                teacher=model,
                prefix=world.PREFIX,
                topic=world.TOPIC,
                forget=world.FORGET,
                retain=world.RETAIN,
                out=cache,
                engine="transformers",
            )
        settings = {"student": model, "cache": cache, "max_steps": arguments.steps}
        compare(scratch, "everything", arguments.measure, **settings)
        rank = arguments.lora_rank
        compare(scratch, f"LoRA of rank {rank}", arguments.measure, **settings, lora_rank=rank)


if __name__ == "__main__":
    main()
