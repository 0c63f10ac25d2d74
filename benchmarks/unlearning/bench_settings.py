"""What a setting changes: students of the demo world, one table a setting.

    python benchmarks/unlearning/bench_settings.py [TABLE ...] [--seeds 0 1] [--rows TEXT ...]

Builds the caches of a table, trains a student a row and evaluates it on the held-out queries,
plainly and under the built-in attacks, none of which is among the views. Points of ROUGE-L recall.
All tables take an hour and a half on two cores, a student 20 to 60 seconds; --rows takes only rows
of which a cell is one of these texts.

- losses: every loss, without views and with one, at the default learning rate; the softmax losses,
  whose gradients are smaller, also at three times it.
- rates: learning rate and epochs.
- retain: with and without retain queries.
- strength: how far cached forget rows are moved away from the base, without views and with one.
- trained: everything, LoRA or some layers, over learning rates as multiples of the one that `auto`
  takes where everything is trained.
- tokens: K, without views and with one.
- views: no view, each built-in wrapper alone, all of them.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_students import COLUMNS, RULE, WIDTH, build_cache, measure, train_student

from duet_unlearn.data.shape_catalogue import VIEWS
from duet_unlearn.distill.auto import LEARNING_RATE_TIMES_WIDTH
from duet_unlearn.distill.config import LOSS_OPTIONS

AUTO_RATE = LEARNING_RATE_TIMES_WIDTH / WIDTH
LOGIT_LOSSES = ("huber", "mse")
WITHOUT_AND_WITH: tuple[tuple[str, ...], ...] = ((), ("@remember",))
TRAINED: tuple[tuple[str, dict[str, Any], tuple[float, ...]], ...] = (
    ("everything", {}, (1, 3)),
    ("LoRA, rank 4", {"lora_rank": 4}, (3, 10, 30)),
    ("LoRA, rank 16", {"lora_rank": 16}, (1, 3, 10, 30)),
    ("LoRA, rank 16, times 1.4", {"lora_rank": 16, "lora_extrapolation": 1.4}, (1, 10)),
    ("layers 0-1 of 4", {"layers": "0-1"}, (1, 3)),
    ("layers 2-3 of 4", {"layers": "2-3"}, (1,)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A student: what stands in front of its numbers, its settings, and those of its cache."""

    label: str
    student: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> list[str]:
        """The label's parts."""
        return self.label.split(" | ")


def losses() -> Iterator[Row]:
    """Each loss by views by rate."""
    for loss, views, times in itertools.product(LOSS_OPTIONS, WITHOUT_AND_WITH, (1, 3)):
        if times == 1 or loss not in LOGIT_LOSSES:
            settings = {"loss": loss, "views": views, "learning_rate": times * AUTO_RATE}
            yield Row(label=f"{loss} | {times} x | {_named(views)}", student=settings)


def rates() -> Iterator[Row]:
    """Each rate by epochs by views."""
    for rate, epochs, views in itertools.product(
        (0.0256, 0.0512, 0.1024), (10, 20), WITHOUT_AND_WITH
    ):
        settings = {"learning_rate": rate / WIDTH, "epochs": epochs, "views": views}
        yield Row(label=f"{rate} | {epochs} | {_named(views)}", student=settings)


def retain() -> Iterator[Row]:
    """With retain queries and without."""
    yield Row(label="forget and retain")
    yield Row(label="forget only", cache={"retain": ()})


def strength() -> Iterator[Row]:
    """Each strength by views."""
    for moved, views in itertools.product((0.0, 0.5, 1.0, 2.0), WITHOUT_AND_WITH):
        label = f"{moved:g} | {_named(views)}"
        yield Row(label=label, student={"views": views}, cache={"strength": moved})


def trained() -> Iterator[Row]:
    """Each choice of what is trained by rate, with a view."""
    for name, chosen, multiples in TRAINED:
        for times in multiples:
            settings = {"views": ("@remember",), "learning_rate": times * AUTO_RATE, **chosen}
            yield Row(label=f"{name} | {times:g}", student=settings)


def tokens() -> Iterator[Row]:
    """Each K by views."""
    for top_k, views in itertools.product((1, 2, 5, 20, 100, 500), WITHOUT_AND_WITH):
        settings = {"top_k": top_k, "views": views}
        yield Row(label=f"{top_k} | {_named(views)}", student=settings, cache={"top_k": 500})


def views() -> Iterator[Row]:
    """Each view alone."""
    for name in ("none", *(f"@{name}" for name in VIEWS), "@views"):
        yield Row(label=name, student={"views": () if name == "none" else (name,)})


TABLES: dict[str, tuple[str, Callable[[], Iterator[Row]]]] = {
    "losses": ("loss | rate | views", losses),
    "rates": ("rate x width | epochs | views", rates),
    "retain": ("queries", retain),
    "strength": ("strength | view", strength),
    "trained": ("trained | rate", trained),
    "tokens": ("K | views", tokens),
    "views": ("view", views),
}


def main() -> None:
    """Print the tables, a row as soon as its student is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT")
    asked = parser.parse_args()
    asked.rows = set(asked.rows)
    if unknown := [name for name in asked.tables if name not in TABLES]:
        parser.error(f"no table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    tables = {
        name: [row for row in TABLES[name][1]() if not asked.rows or asked.rows & set(row.cells)]
        for name in asked.tables or TABLES
    }
    if not any(tables.values()):
        parser.error(f"no row has a cell {' or '.join(sorted(asked.rows))}")
    for name, chosen in tables.items():
        if not chosen:
            continue
        head, _ = TABLES[name]
        print(f"| {head} | seed | {COLUMNS} |")
        print(f"| {' | '.join('---' for _ in head.split('|'))} | ---: | {RULE} |", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            caches: dict[str, Path] = {}
            for number, (row, seed) in enumerate(itertools.product(chosen, asked.seeds)):
                key = json.dumps(row.cache)
                if key not in caches:
                    caches[key] = build_cache(Path(scratch) / f"cache-{len(caches)}", **row.cache)
                out = Path(scratch) / f"student-{number}"
                train_student(caches[key], out, seed=seed, **row.student)
                print(f"| {row.label} | {seed} | {measure(out).cells} |", flush=True)
        print()


def _named(views: tuple[str, ...]) -> str:
    return ", ".join(views) or "none"


if __name__ == "__main__":
    main()
