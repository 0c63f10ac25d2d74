"""Learning rate and epochs on the demo world: what is forgotten, kept, and how well it holds.

    python benchmarks/bench_training_defaults.py [--seeds 0 1]

Trains students from one cache over a grid and evaluates them on held-out queries, plainly and under
the built-in attacks, none of which is among the views. Points of ROUGE-L recall; takes about
twenty minutes on two cores.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.distill.eval_config import EvalConfig, ModelSpec
from duet_unlearn.distill.evaluate import evaluate
from duet_unlearn.distill.run import RunConfig, run
from duet_unlearn.teacher_cache.build import build
from duet_unlearn.teacher_cache.build_config import BuildConfig

RATES_TIMES_WIDTH = (0.0256, 0.0512, 0.1024)
EPOCHS = (10, 20)
VIEWS: tuple[tuple[str, ...], ...] = ((), ("@remember",))
WIDTH = 192


def main() -> None:
    """Build one cache, train the grid, print one row a student."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    seeds = parser.parse_args().seeds
    prefix = resolve_prefix(world.PREFIX, world.TOPIC)
    print(
        "lr * width  epochs  views      seed   forget  retain  general  worst attack  retain under"
    )
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        build(
            BuildConfig(
                teacher=str(world.MODEL),
                forget=(str(world.FORGET),),
                retain=(str(world.RETAIN),),
                prefix=prefix,
                out=cache,
                engine="transformers",
            )
        )
        grid = itertools.product(RATES_TIMES_WIDTH, EPOCHS, VIEWS, seeds)
        for number, (rate, epochs, views, seed) in enumerate(grid):
            student = Path(scratch) / f"student-{number}"
            run(
                RunConfig(
                    cache=str(cache),
                    student=str(world.MODEL),
                    out=str(student),
                    learning_rate=rate / WIDTH,
                    epochs=epochs,
                    views=views,
                    seed=seed,
                )
            )
            report = evaluate(
                EvalConfig(
                    models=(
                        ModelSpec(label="base", model=str(world.MODEL)),
                        ModelSpec(label="student", model=str(student)),
                    ),
                    forget=(str(world.FORGET_HELDOUT),),
                    retain=(str(world.RETAIN_HELDOUT),),
                    general=(str(world.GENERAL),),
                    attacks=("@attacks",),
                )
            )
            recalls = [
                report.split_means("student", split).rouge_l_recall
                for split in ("forget", "retain", "general")
            ]
            print(
                f"{rate:>10} {epochs:>7}  {', '.join(views) or 'none':<10} {seed:>4} "
                f"{recalls[0]:>8.1f} {recalls[1]:>7.1f} {recalls[2]:>8.1f} "
                f"{report.worst_forget('student'):>13.1f} {report.worst_retain('student'):>13.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
