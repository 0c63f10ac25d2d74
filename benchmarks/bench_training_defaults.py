"""Learning rate and epochs on the demo world: what is forgotten, kept, and how well it holds.

    python benchmarks/bench_training_defaults.py [--seeds 0 1]

Trains students from one cache over a grid and evaluates them on held-out queries, plainly and under
the built-in attacks, none of which is among the views. Points of ROUGE-L recall; takes about
twenty minutes on two cores.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

from demo_students import COLUMNS, RULE, WIDTH, build_cache, measure, train_student

RATES_TIMES_WIDTH = (0.0256, 0.0512, 0.1024)
EPOCHS = (10, 20)
VIEWS: tuple[tuple[str, ...], ...] = ((), ("@remember",))


def main() -> None:
    """Build one cache, train the grid, print one row a student."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    seeds = parser.parse_args().seeds
    print(f"| rate x width | epochs | views | seed | {COLUMNS} |")
    print(f"| ---: | ---: | --- | ---: | {RULE} |")
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache")
        grid = itertools.product(RATES_TIMES_WIDTH, EPOCHS, VIEWS, seeds)
        for number, (rate, epochs, views, seed) in enumerate(grid):
            student = train_student(
                cache,
                Path(scratch) / f"student-{number}",
                learning_rate=rate / WIDTH,
                epochs=epochs,
                views=views,
                seed=seed,
            )
            label = f"{rate} | {epochs} | {', '.join(views) or 'none'} | {seed}"
            print(f"| {label} | {measure(student).cells} |", flush=True)


if __name__ == "__main__":
    main()
