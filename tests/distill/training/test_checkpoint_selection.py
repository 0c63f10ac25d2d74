import pytest

from duet_unlearn.distill.training.checkpoint_selection import Evaluation, Rule


def course(*recalls: tuple[float, float]) -> list[Evaluation]:
    """Evaluations every 10 steps, the base's first."""
    return [
        Evaluation(step=10 * i, forget=f, retain=r, forget_plain=f, retain_plain=r)
        for i, (f, r) in enumerate(recalls)
    ]


@pytest.mark.parametrize(
    ("recalls", "step"),
    [
        (((100, 100), (60, 99), (20, 98)), 20),
        # The lowest forget recall of all keeps too little: 96.9 is more than 3 below 100.
        (((100, 100), (60, 99), (10, 97), (0, 96.9)), 20),
        # Among equals the latest, also where an earlier one kept more.
        (((100, 100), (0, 100), (0, 98), (5, 100)), 20),
        # What is kept is measured against the base, not against 100.
        (((80, 50), (10, 47), (0, 46)), 10),
        # None kept enough: the one that kept most, then forgot most, then the latest.
        (((100, 100), (50, 80), (0, 90), (30, 90)), 20),
        (((100, 100), (50, 90), (50, 90)), 20),
        # The base itself is never the student.
        (((0, 100), (5, 100)), 10),
    ],
)
def test_the_step_that_forgets_most_and_keeps_enough(recalls, step):
    assert Rule(drop=3.0).choose(course(*recalls)).step == step


@pytest.mark.parametrize(
    ("recalls", "stop"),
    [
        ((), False),
        (((100, 100),), False),
        # Two without less being told.
        (((100, 100), (20, 100), (20, 100), (30, 100)), True),
        (((100, 100), (20, 100), (20, 100)), False),
        # Every drop starts the count again.
        (((100, 100), (50, 100), (50, 100), (49, 100), (49, 100)), False),
        (((100, 100), (50, 100), (50, 100), (49, 100), (49, 100), (60, 100)), True),
        # Before anything is forgotten a wait says nothing.
        (((100, 100),) + 9 * ((100, 100),), False),
        # Nor while no step kept enough: the retain set may recover.
        (((100, 100), (20, 50), (20, 60), (20, 70)), False),
        # Steps that keep too little do not count as progress, but as waiting.
        (((100, 100), (20, 100), (10, 50), (0, 50)), True),
    ],
)
def test_the_early_stop_waits_for_forgetting_first(recalls, stop):
    assert Rule(drop=3.0, patience=2).may_stop(course(*recalls)) is stop
