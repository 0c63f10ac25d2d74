"""Which step's weights become the student, and when training may end early.

Recalls are points of ROUGE-L recall on held-out queries, 0 to 100. With attacks, the highest recall
of forget queries and the lowest of retain queries count, plain queries among them.

The student is the evaluated step that forgets most of those that keep enough:

1. keep enough: its retain recall is at most `drop` points below the base's;
2. of these, the lowest forget recall; of equals, the latest step.

If no step keeps enough, it is the step with the highest retain recall.
"""

from collections.abc import Sequence
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


def keeps_enough(evaluation: Evaluation, base: Evaluation, drop: float) -> bool:
    """Return whether retain recall is at most `drop` points below the base's."""
    return evaluation.retain >= base.retain - drop


def choose(evaluations: Sequence[Evaluation], drop: float) -> Evaluation:
    """Return the evaluation whose step becomes the student.

    Args:
        evaluations: The base's first, then one or more in the order of their steps.
        drop: Points of retain recall that may be lost.
    """
    base, *steps = evaluations
    enough = [step for step in steps if keeps_enough(step, base, drop)]
    if enough:
        return min(enough, key=lambda found: (found.forget, -found.step))
    return max(steps, key=lambda found: (found.retain, -found.forget, found.step))


def may_stop(evaluations: Sequence[Evaluation], drop: float, patience: int) -> bool:
    """Return whether `patience` evaluations in a row brought nothing.

    Training goes on while no step has kept enough, and while none of those that did has forgotten
    anything: it has not begun then, and a wait says nothing.

    Args:
        evaluations: The base's first; none at all before training.
        drop: Points of retain recall that may be lost.
        patience: Evaluations without a lower forget recall to wait for.
    """
    if not evaluations:
        return False
    base, *steps = evaluations
    enough = [step for step in steps if keeps_enough(step, base, drop)]
    lowest = min((step.forget for step in enough), default=base.forget)
    if lowest >= base.forget:
        return False
    first = next(step.step for step in enough if step.forget == lowest)
    return sum(step.step > first for step in steps) >= patience
