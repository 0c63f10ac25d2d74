"""The result of an attack: what each model says behind what was searched, as JSON and as text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from duet_unlearn.data.queries import Query
from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.evaluation.results import STRESS_TEST_FORMAT
from duet_unlearn.evaluation.statistics import Number
from duet_unlearn.evaluation.table import Column, format_points, join_blocks, render_columns
from duet_unlearn.versions import versions

PLAIN, SUFFIX, SOFT = "none", "suffix", "soft prompt"
"""The attacks of an `Outcome`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one model says under one attack."""

    model: str
    attack: str
    """`none`, `suffix` or `soft prompt`."""
    suffix: str | None
    """What was found, as it stands behind each query."""
    loss: float
    """Mean cross-entropy of the training answers, in nats a token: how well the attack fits."""
    recalled: Number
    """ROUGE-L recall of the forget queries that it was not trained on."""
    named: Number
    """Those that are answered with the whole reference answer."""
    retained: Number | None
    """ROUGE-L recall of retain queries; None where none are asked."""
    texts: tuple[str, ...]
    """One answer a query of the report's `asked`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackReport:
    """All attacks on all models."""

    config: AttackConfig
    prefix: str | None
    train: tuple[Query, ...]
    asked: tuple[Query, ...]
    """Forget queries, then retain queries."""
    outcomes: Sequence[Outcome]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers are points with count and interval."""
        return {
            "format": STRESS_TEST_FORMAT,
            "versions": versions(),
            "config": self.config.to_json(),
            "prefix": self.prefix,
            "trained": len(self.train),
            "asked": [
                {"split": q.split, "id": q.query_id, "query": q.text, "answer": q.answer}
                for q in self.asked
            ],
            "attacking": [dataclasses.asdict(outcome) for outcome in self.outcomes],
        }


def format_attacks(report: AttackReport) -> str:
    """Return a table, a row a model, and the suffixes that were found."""
    found = {(o.model, o.attack): o for o in report.outcomes}
    models = list(dict.fromkeys(model for model, _ in found))
    attacks = list(dict.fromkeys(attack for _, attack in found))

    def column(split: str, attack: str) -> Column:
        outcomes = [found[model, attack] for model in models]
        numbers = [o.recalled if split == "forget" else o.retained for o in outcomes]
        heading = split if attack == PLAIN else f"{split} {attack}"
        return heading, [format_points(None if n is None else n.mean) for n in numbers]

    splits = ["forget", "retain"] if report.config.retain else ["forget"]
    columns = [column(split, attack) for split in splits for attack in attacks]
    forget = sum(query.split == "forget" for query in report.asked)
    kept = len(report.asked) - forget
    note = (
        f"Mean ROUGE-L recall, in points (0-100), of {forget} forget queries whose answers the "
        f"attacks were not trained on{f' and of {kept} retain queries' if kept else ''}: plainly, "
        "behind a searched suffix, behind a trained soft prompt. Each is trained on "
        f"{len(report.train)} other forget queries, for each model on its own."
    )
    blocks = render_columns("Searched attacks", models, columns)
    suffixes = [f"  {o.model}: {o.suffix!r}" for o in report.outcomes if o.suffix is not None]
    if suffixes:
        blocks.append("\n".join(["Suffixes, behind each query", *suffixes]))
    return join_blocks(blocks, note)
