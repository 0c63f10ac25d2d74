"""What does a strengthened prefix change for a student?

    python benchmarks/bench_strength.py [--strengths 0 1 ...] [--views none @remember ...]

Builds a cache of each strength and trains a student on it with each view, then evaluates them on
the demo world's held-out queries, plainly and under the built-in attacks, none of which shares its
text with a view. Points of ROUGE-L recall; takes about six minutes on two cores.
"""

import argparse
import tempfile
from pathlib import Path

from demo_students import COLUMNS, RULE, build_cache, measure, train_student


def main() -> None:
    """Build the caches, train the students, print one row each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--views", nargs="+", default=["none", "@remember"])
    chosen = parser.parse_args()
    print(f"| strength | view | {COLUMNS} |\n| ---: | --- | {RULE} |")
    with tempfile.TemporaryDirectory() as scratch:
        for strength in chosen.strengths:
            cache = build_cache(Path(scratch) / f"cache-{strength:g}", strength=strength)
            for number, view in enumerate(chosen.views):
                views = () if view == "none" else (view,)
                out = Path(scratch) / f"student-{strength:g}-{number}"
                student = train_student(cache, out, views=views)
                print(f"| {strength:g} | {view} | {measure(student).cells} |", flush=True)


if __name__ == "__main__":
    main()
