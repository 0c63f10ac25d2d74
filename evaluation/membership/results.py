"""The result of a membership test: every score, and how well each separates the two sets."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duet_unlearn.data.queries import Query
from duet_unlearn.evaluation.membership.config import MembershipConfig
from duet_unlearn.evaluation.membership.scores import SCORES
from duet_unlearn.evaluation.results import STRESS_TEST_FORMAT
from duet_unlearn.evaluation.statistics import Scores, Separation, separate
from duet_unlearn.evaluation.table import join_blocks, render_columns
from duet_unlearn.versions import versions


@dataclass(frozen=True, kw_only=True)
class MembershipReport:
    """All scores of all models."""

    config: MembershipConfig
    forget: tuple[Query, ...]
    holdout: tuple[Query, ...]
    scores: Mapping[str, Mapping[str, Scores]]
    """Of each model by score: one value a text, those of `forget` first."""

    @functools.cached_property
    def separations(self) -> dict[str, dict[str, Separation]]:
        """Of each model by score: how well it tells forgotten texts from the holdout's."""
        at = len(self.forget)
        return {
            label: {name: separate(values[:at], values[at:]) for name, values in scores.items()}
            for label, scores in self.scores.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        sides = (("forget", self.forget), ("holdout", self.holdout))
        texts = [(side, query) for side, queries in sides for query in queries]
        return {
            "format": STRESS_TEST_FORMAT,
            "versions": versions(),
            "config": self.config.to_json(),
            "scores": {name: score.description for name, score in SCORES.items()},
            "membership": [
                {"model": label, "score": name, **dataclasses.asdict(found)}
                for label, by_score in self.separations.items()
                for name, found in by_score.items()
            ],
            "texts": [
                {
                    "side": side,
                    "id": query.query_id,
                    "query": query.text,
                    "answer": query.answer,
                    "scores": {
                        label: {name: float(values[index]) for name, values in scores.items()}
                        for label, scores in self.scores.items()
                    },
                }
                for index, (side, query) in enumerate(texts)
            ],
        }


def format_membership(report: MembershipReport) -> str:
    """Return a table: a row a model, a column a score, each AUC with its interval."""
    labels = list(report.separations)
    rows = report.separations.values()
    columns = [
        (name, [f"{r[name].auc:.2f} ({r[name].low:.2f}-{r[name].high:.2f})" for r in rows])
        for name in SCORES
    ]
    notes = (
        f"AUC with its 95% interval: how often one of {len(report.forget)} forgotten texts scores "
        f"above one of {len(report.holdout)} of the holdout. 0.50 is chance. Wording sets "
        "texts apart as well as memory: read a student against its base."
    )
    blocks = render_columns("Forgotten texts against the holdout", labels, columns)
    return join_blocks(blocks, notes)
