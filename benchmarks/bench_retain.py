"""What does a student lose that is trained without retain queries?

    python benchmarks/bench_retain.py

Trains one student of the demo world from forget and retain queries and one from forget queries
alone, and evaluates both on held-out queries. Points of ROUGE-L recall; two minutes on two cores.
"""

import tempfile
from pathlib import Path

from demo_students import COLUMNS, RULE, build_cache, measure, train_student

from duet_unlearn.data import demo_world as world


def main() -> None:
    """Build both caches, train from each, print one row each."""
    print(f"| queries | {COLUMNS} |\n| --- | {RULE} |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, retain in (("forget and retain", (str(world.RETAIN),)), ("forget only", ())):
            cache = build_cache(folder / name / "cache", retain=retain)
            student = train_student(cache, folder / name / "student")
            print(f"| {name} | {measure(student).cells} |", flush=True)


if __name__ == "__main__":
    main()
