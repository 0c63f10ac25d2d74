"""Every loss on the demo world: which forgets, keeps and resists best.

    python benchmarks/bench_losses.py [--seeds 0 1] [--losses huber kl]

One cache (K = 100, the first position), and from it a student for each loss, without views and
with one, at the default learning rate; the softmax losses, whose gradients are smaller, also at
three times it. Scores are points of ROUGE-L recall on held-out queries, plainly and under the
built-in attacks, none of which is the view. About half an hour on two cores.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

from demo_students import COLUMNS, RULE, WIDTH, build_cache, measure, train_student

from duet_unlearn.distill.config import AUTO_LEARNING_RATE_TIMES_WIDTH, LOSS_OPTIONS

VIEWS: tuple[tuple[str, ...], ...] = ((), ("@remember",))
LOGIT_LOSSES = ("huber", "mse")


def main() -> None:
    """Build one cache, train a student a row, print its scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--losses", nargs="+", choices=LOSS_OPTIONS, default=LOSS_OPTIONS)
    arguments = parser.parse_args()
    print(f"| loss | rate | views | seed | {COLUMNS} |")
    print(f"| --- | ---: | --- | ---: | {RULE} |")
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache")
        grid = itertools.product(arguments.losses, VIEWS, (1, 3), arguments.seeds)
        for number, (loss, views, factor, seed) in enumerate(grid):
            if factor != 1 and loss in LOGIT_LOSSES:
                continue
            student = train_student(
                cache,
                Path(scratch) / f"student-{number}",
                loss=loss,
                views=views,
                learning_rate=factor * AUTO_LEARNING_RATE_TIMES_WIDTH / WIDTH,
                seed=seed,
            )
            label = f"{loss} | {factor} x | {', '.join(views) or 'none'} | {seed}"
            print(f"| {label} | {measure(student).cells} |", flush=True)


if __name__ == "__main__":
    main()
