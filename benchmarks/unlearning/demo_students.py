"""Train students on the demo world and measure them: what the quality comparisons share."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.evaluate import evaluate
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig

# The demo world's maker, for what is imported next: a tool of the repository, not in the package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

WIDTH = 192
"""Hidden size of the demo world's model."""

COLUMNS = "forget | retain | general | worst attack | retain under attack"
RULE = "---: | ---: | ---: | ---: | ---:"
"""The head of a Markdown table over `Outcome.cells`, its row label left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """ROUGE-L recall in points on held-out queries."""

    forget: float
    retain: float
    general: float
    worst_attack: float
    """Largest recall of forget queries under any built-in attack."""
    retain_attacked: float
    """Smallest recall of retain queries under any built-in attack."""

    @property
    def cells(self) -> str:
        """The numbers as cells of a Markdown table, in the order of `COLUMNS`."""
        numbers = (
            self.forget,
            self.retain,
            self.general,
            self.worst_attack,
            self.retain_attacked,
        )
        return " | ".join(f"{number:.1f}" for number in numbers)


def build_cache(out: Path, **settings: Any) -> Path:
    """Build a cache of the demo world's teacher; settings are those of `BuildConfig`."""
    defaults: dict[str, Any] = {
        "teacher": str(world.MODEL),
        "forget": (str(world.FORGET),),
        "retain": (str(world.RETAIN),),
        "prefix": resolve_prefix(world.PREFIX, world.TOPIC),
        "out": out,
        "engine": "transformers",
    }
    build(BuildConfig(**(defaults | settings)))
    return out


def train_student(cache: Path, out: Path, **settings: Any) -> Path:
    """Train the demo world's model from a cache; settings are those of `RunConfig`."""
    run(RunConfig(cache=str(cache), student=str(world.MODEL), out=str(out), **settings))
    return out


def measure(student: Path) -> Outcome:
    """Evaluate a student on the held-out queries, plainly and under attack."""
    report = evaluate(
        EvalConfig(
            models=(ModelSpec(label="student", model=str(student)),),
            forget=(str(world.FORGET_HELDOUT),),
            retain=(str(world.RETAIN_HELDOUT),),
            general=(str(world.GENERAL),),
            attacks=("@attacks",),
        )
    )
    forget, retain, general = (
        report.mean("student", split=split) for split in ("forget", "retain", "general")
    )
    return Outcome(
        forget=forget,
        retain=retain,
        general=general,
        worst_attack=report.worst("student", "forget"),
        retain_attacked=report.worst("student", "retain"),
    )
