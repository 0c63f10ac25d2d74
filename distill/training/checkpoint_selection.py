"""Which step's weights become the student, and when training may end early.

Recalls are points of ROUGE-L recall on held-out queries, 0 to 100. With attacks, the highest recall
of forget queries and the lowest of retain queries count, plain queries among them.

The student is the evaluated step that forgets most of those that keep enough:

1. keep enough: its retain recall is at most `drop` points below the base's;
2. of these, the lowest forget recall; of equals, the latest step.

If no step keeps enough, it is the step with the highest retain recall.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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

    def metrics(self) -> dict[str, float]:
        """Return the recalls as the Trainer names metrics."""
        recalls = dataclasses.asdict(self)
        return {f"eval_{name}": value for name, value in recalls.items() if name != "step"}


def evaluations_of(history: Sequence[Mapping[str, float]]) -> list[Evaluation]:
    """Return the evaluations that a Trainer's log history tells of, the base's first."""
    names = [field.name for field in dataclasses.fields(Evaluation) if field.name != "step"]
    return [
        Evaluation(step=int(entry["step"]), **{name: entry[f"eval_{name}"] for name in names})
        for entry in history
        if "eval_forget" in entry
    ]


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
