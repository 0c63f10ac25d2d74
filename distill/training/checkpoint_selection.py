"""Which step's weights become the student, and when training may end early.

Recalls are points of ROUGE-L recall on held-out queries, 0 to 100. With attacks, the highest recall
of forget queries and the lowest of retain queries count, plain queries among them.

The student is the evaluated step that forgets most of those that keep enough:

1. keep enough: its retain recall is at most `drop` points below the base's;
2. of these, the lowest forget recall; of equals, the latest step.

If no step keeps enough, it is the step with the highest retain recall. Where a held-out cache is
evaluated in place of queries, it is the step with the lowest loss.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Recalls at one step, in points; step 0 is the base."""

    step: int
    forget: float
    """Of forget queries, plainly or under the attack that gets most."""
    retain: float
    """Of retain queries, plainly or under the attack that harms most."""
    forget_plain: float
    retain_plain: float

    def __str__(self) -> str:
        return f"forget {self.forget:.1f}, retain {self.retain:.1f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLoss:
    """Means over the rows of a held-out cache at one step; step 0 is the base."""

    step: int
    loss: float
    """The run's own, at all positions."""
    cross_entropy: float
    """Of the rows' tokens, in nats a token; a row counts as one, however long."""

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, cross-entropy {self.cross_entropy:.4f}"


def metrics_of(found: Evaluation | HeldOutLoss) -> dict[str, float]:
    """Return what was found as the Trainer names metrics."""
    values = dataclasses.asdict(found)
    return {f"eval_{name}": value for name, value in values.items() if name != "step"}


def evaluations_of(history: Sequence[Mapping[str, float]]) -> list[Any]:
    """Return the evaluations that a Trainer's log history tells of, the base's first."""
    found: list[Any] = []
    for entry in history:
        for kind in (Evaluation, HeldOutLoss):
            names = {field.name for field in dataclasses.fields(kind)} - {"step"}
            if all(f"eval_{name}" in entry for name in names):
                values = {name: entry[f"eval_{name}"] for name in names}
                found.append(kind(step=int(entry["step"]), **values))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Which step becomes the student, and when to stop waiting for a better one."""

    drop: float
    """Points of retain recall that may be lost."""
    patience: int | None = None
    """Evaluations in a row without a lower forget recall to wait for; None waits to the end."""

    def keeps_enough(self, evaluation: Evaluation, base: Evaluation) -> bool:
        """Return whether retain recall is at most `drop` points below the base's."""
        return evaluation.retain >= base.retain - self.drop

    def choose(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """Return the best evaluation of those behind the base's; there is at least one."""
        base, *steps = evaluations
        enough = [step for step in steps if self.keeps_enough(step, base)]
        if enough:
            return min(enough, key=lambda found: (found.forget, -found.step))
        return max(steps, key=lambda found: (found.retain, -found.forget, found.step))

    def may_stop(self, evaluations: Sequence[Evaluation]) -> bool:
        """Return whether `patience` evaluations in a row brought nothing.

        Training continues while no step has kept enough, and while none of those that did has
        forgotten anything: it has not begun then, and a wait says nothing.
        """
        if self.patience is None or not evaluations:
            return False
        base, *steps = evaluations
        enough = [step for step in steps if self.keeps_enough(step, base)]
        lowest = min((step.forget for step in enough), default=base.forget)
        if lowest >= base.forget:
            return False
        first = next(step.step for step in enough if step.forget == lowest)
        return sum(step.step > first for step in steps) >= self.patience


@dataclass(frozen=True, kw_only=True, slots=True)
class LowestLoss:
    """The same by the loss on a held-out cache."""

    patience: int | None = None
    """Evaluations in a row without a lower loss to wait for; None waits to the end."""

    def choose(self, evaluations: Sequence[HeldOutLoss]) -> HeldOutLoss:
        """Return the best evaluation of those behind the base's; of equals the first."""
        return min(evaluations[1:], key=lambda found: found.loss)

    def may_stop(self, evaluations: Sequence[HeldOutLoss]) -> bool:
        """Return whether `patience` evaluations in a row brought nothing."""
        if self.patience is None or len(evaluations) <= self.patience:
            return False
        best = self.choose(evaluations).step
        return sum(found.step > best for found in evaluations) >= self.patience
