"""Everything, LoRA or some layers: what is forgotten and kept, over learning rates.

    python benchmarks/bench_trained.py [--views @remember]

Trains students of the demo world from one cache and evaluates them on its held-out queries, plainly
and under the built-in attacks. Points of ROUGE-L recall; the rate is a multiple of the one that
`auto` takes where everything is trained. Takes some twenty minutes on two cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from demo_students import COLUMNS, RULE, WIDTH, build_cache, measure, train_student

from duet_unlearn.distill.config import AUTO_LEARNING_RATE_TIMES_WIDTH

CHOICES: tuple[tuple[str, dict[str, Any], tuple[float, ...]], ...] = (
    ("everything", {}, (1, 3)),
    ("LoRA, rank 4", {"lora_rank": 4}, (3, 10, 30)),
    ("LoRA, rank 16", {"lora_rank": 16}, (1, 3, 10, 30)),
    ("layers 0-1 of 4", {"layers": "0-1"}, (1, 3)),
    ("layers 2-3 of 4", {"layers": "2-3"}, (1,)),
)


def main() -> None:
    """Build one cache, train the students, print one row each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", nargs="*", default=["@remember"])
    views = tuple(parser.parse_args().views)
    print(f"| trained | rate | {COLUMNS} |\n| --- | ---: | {RULE} |")
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache")
        for name, settings, times in CHOICES:
            for multiple in times:
                out = Path(scratch) / f"{name}-{multiple}".replace(" ", "-")
                rate = multiple * AUTO_LEARNING_RATE_TIMES_WIDTH / WIDTH
                train_student(cache, out, views=views, learning_rate=rate, **settings)
                print(f"| {name} | {multiple:g} | {measure(out).cells} |", flush=True)


if __name__ == "__main__":
    main()
