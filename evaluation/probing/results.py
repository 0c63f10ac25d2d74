"""The result of a probe: a row a model and layer, as JSON values and as plain text."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duet_unlearn.data.queries import Query
from duet_unlearn.evaluation.probing.config import ProbeConfig
from duet_unlearn.evaluation.results import STRESS_TEST_FORMAT
from duet_unlearn.evaluation.statistics import Number
from duet_unlearn.evaluation.table import Column, format_points, join_blocks, render_columns
from duet_unlearn.versions import versions


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLook:
    """One layer of one model; numbers are points (0 to 100) but for the ranks."""

    model: str
    layer: int
    """Counted from 1; the last one is what the model says."""
    rank: float
    """Logit lens: the median rank of the forget answers' first tokens, 1 for the likeliest."""
    probability: Number
    """Logit lens: of the same tokens."""
    retain_rank: float
    retain_probability: Number
    told_apart: Number
    """Linear probe: pairs of forget queries whose answers it tells apart; 50 is chance."""
    shuffled: float
    """The same by probes that were trained on exchanged answers."""
    retain_told_apart: Number
    """Pairs of retain queries, by cross-validation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What every layer of every model holds."""

    config: ProbeConfig
    prefix: str | None
    queries: tuple[Query, ...]
    """Forget queries, then retain queries."""
    pairs: Mapping[str, int]
    """How many pairs of each split the linear probe tells apart or not."""
    looks: tuple[LayerLook, ...]
    reads: Mapping[str, list[dict[str, Any]]]
    """Of each model, one a query: the logit lens's `ranks` and `probabilities`, by layer."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "format": STRESS_TEST_FORMAT,
            "versions": versions(),
            "config": self.config.to_json(),
            "prefix": self.prefix,
            "pairs": dict(self.pairs),
            "probing": [dataclasses.asdict(look) for look in self.looks],
            "queries": [
                {
                    "split": query.split,
                    "id": query.query_id,
                    "query": query.text,
                    "answer": query.answer,
                    "lens": {label: found[index] for label, found in self.reads.items()},
                }
                for index, query in enumerate(self.queries)
            ],
        }


def format_probe(report: ProbeReport) -> str:
    """Return a table for the logit lens and one for the linear probe, a row a layer."""
    by_model: dict[str, list[LayerLook]] = {}
    for look in report.looks:
        by_model.setdefault(look.model, []).append(look)
    layers = [f"layer {n}" for n in range(1, 1 + max(map(len, by_model.values())))]

    def column(label: str, name: str, cells: list[str]) -> Column:
        return f"{label} {name}", [*cells, *["-"] * (len(layers) - len(cells))]

    lens, probe = [], []
    for label, looks in by_model.items():
        lens += [
            column(label, "rank", [f"{look.rank:g}" for look in looks]),
            column(label, "%", [format_points(look.probability.mean) for look in looks]),
        ]
        probe += [
            column(label, "", [format_points(look.told_apart.mean) for look in looks]),
            column(label, "shuffled", [format_points(look.shuffled) for look in looks]),
            column(label, "retain", [format_points(look.retain_told_apart.mean) for look in looks]),
        ]
    count = sum(query.split == "forget" for query in report.queries)
    notes = [
        f"Logit lens: of {count} forget queries the median rank and the mean probability of the "
        "answer's first token, read off each layer; the last one is what the model says.",
        f"Linear probe: of {report.pairs['forget']} pairs of forget queries those whose answers it "
        "tells apart, in points (50 is chance), trained on retain queries. shuffled: trained on "
        "exchanged answers. retain: of retain queries, by cross-validation.",
    ]
    blocks = render_columns("Logit lens", layers, lens)
    blocks += render_columns("Linear probe", layers, probe)
    return join_blocks(blocks, *notes)
