"""Which built-in view makes a student hold against attacks that it has not seen?

    python benchmarks/bench_views.py [--views @remember ...]

Trains one student without views, one with each built-in view alone, and one with all of them, and
evaluates them on the demo world's held-out queries, plainly and under the built-in attacks, none of
which shares its text with a view. Points of ROUGE-L recall; takes about ten minutes on two cores.
"""

import argparse
import tempfile
from pathlib import Path

from demo_students import COLUMNS, RULE, build_cache, measure, train_student

from duet_unlearn.data.shape_catalogue import VIEWS


def main() -> None:
    """Build one cache, train the students, print one row each."""
    every = ["none", *(f"@{name}" for name in VIEWS), "@views"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", nargs="+", default=every)
    chosen = parser.parse_args().views
    print(f"| view | {COLUMNS} |\n| --- | {RULE} |")
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache")
        for number, view in enumerate(chosen):
            views = () if view == "none" else (view,)
            student = train_student(cache, Path(scratch) / f"student-{number}", views=views)
            print(f"| {view} | {measure(student).cells} |", flush=True)


if __name__ == "__main__":
    main()
