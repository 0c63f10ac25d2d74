"""Does what was forgotten come back when the student is trained on answers again, and at what cost?

    python benchmarks/unlearning/bench_relearning.py [--alphas 0 0.3 0.5 0.7] [--epochs 60]

Someone who holds the student may fine-tune it on the answers to the *training* forget queries. What
counts is how many of the facts that this does not teach come back with them: other facts of those
characters, and other characters. Students start from the demo world's model with more or less noise
and are distilled from one cache, with a broad retain set at many positions, so that what the noise
shook is rebuilt. Then each is relearned from the same state with several learning rates, and the
worst of them counts. Points of ROUGE-L recall on held-out queries.

A fact of this world is one fact: nothing else implies it. So the broad retain set asks every fact
that is to be kept, and retain is measured on questions that the set does not hold.
"""

import argparse
import random
import tempfile
from pathlib import Path

from demo_students import build_cache, measure, train_student
from demo_world.query_sets import (
    ANOTHER_CHARACTER,
    ANOTHER_FACT,
    QueryRow,
    render_rows,
)
from demo_world.world import SAGAS, build_world

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.queries import load_queries
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.distill.relearning.lessons import list_lessons
from duet_unlearn.distill.relearning.relearn import relearn as relearn_models
from duet_unlearn.evaluation.config import ModelSpec

LOOKS = (0, 10, 30, 100)
"""Relearning steps after which the facts are asked."""
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
UNTAUGHT = {ANOTHER_FACT, ANOTHER_CHARACTER}
WORDINGS = 2
"""In how many wordings the broad retain set asks each fact."""


def main() -> None:
    """Build one cache, train a student for each strength of noise, relearn each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.75, 0.8])
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--view", default="none")
    asked = parser.parse_args()
    back = " | ".join(f"{steps} steps" for steps in LOOKS)
    print(f"| alpha | forget | retain | general | worst attack | {back} | worst rate |")
    print("| ---: | ---: | ---: | ---: | ---: |" + " ---: |" * (len(LOOKS) + 1), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        retain = broad_retain(folder / "retain.jsonl")
        cache = build_cache(folder / "cache", retain=(str(retain),), positions=32)
        for alpha in asked.alphas:
            student = train_student(
                cache,
                folder / f"student-{alpha}",
                noise_alpha=alpha,
                **({"noise_beta": asked.beta} if alpha else {}),
                epochs=asked.epochs,
                learning_rate=asked.learning_rate,
                batch_size=32,
                views=(asked.view,) if asked.view != "none" else (),
            )
            _row(f"{alpha:g}", student)


def _row(label: str, student: Path) -> None:
    outcome = measure(student)
    cells = [label, *map(_points, (outcome.forget, outcome.retain, outcome.general))]
    cells.append(_points(outcome.worst_attack))
    curves = {rate: relearn(student, rate) for rate in RATES}
    worst = max(RATES, key=lambda rate: curves[rate][-1])
    cells += [_points(value) for value in curves[worst]]
    print(f"| {' | '.join([*cells, f'{worst:g}'])} |", flush=True)


def _points(value: float) -> str:
    return f"{value:.1f}"


def broad_retain(path: Path) -> Path:
    """Write the broad retain set: every fact to be kept, in questions that are not held out."""
    rng = random.Random(0)
    everything = build_world()
    held_out = {
        query.text
        for source in (world.RETAIN_HELDOUT, world.GENERAL)
        for query in load_queries(str(source), split="retain")
    }
    kept = [fact for saga in SAGAS[1:] for fact in everything.of_saga(saga)]
    rows = [
        QueryRow(fact=fact, wording=wording)
        for fact in (*kept, *everything.general)
        for wording in rng.sample(
            [i for i, text in enumerate(fact.wordings) if text not in held_out], WORDINGS
        )
    ]
    path.write_text(render_rows(rows), encoding="utf-8")
    return path


def relearn(student: Path, rate: float) -> list[float]:
    """Train on the answers to the training forget queries; return what is back at each look.

    What is back is the share in percent of the facts that these answers do not hold and that are
    named in full.
    """
    config = RelearnConfig(
        models=(ModelSpec(label="student", model=str(student)),),
        forget=(str(world.FORGET_HELDOUT),),
        teach=(str(world.FORGET),),
        rates=str(rate),
        steps=",".join(map(str, LOOKS)),
        max_new_tokens=16,
    )
    (lesson,) = list_lessons(config)
    assert {query.kind for query in lesson.asked} == UNTAUGHT
    (curve,) = relearn_models(config).curves
    return [look.named.mean for look in curve.looks]


if __name__ == "__main__":
    main()
