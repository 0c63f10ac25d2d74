"""Three requests one after another: does what was forgotten first stay forgotten?

    python benchmarks/unlearning/bench_requests.py [--views @remember ...]

The demo world's model is to forget one saga, then another, then a third, each time by a cache of
its own: queries of that saga behind a prefix that names it, and as retain queries what is to be
kept at that time, so that the first cache retains what later ones forget. Each student is trained
from the one before, once by its request's cache alone and once with `--replay` of the earlier ones;
a last student is trained from the base by all three at once. Points of ROUGE-L recall on held-out
queries, plainly and under the attack @role-play.
"""

import argparse
import random
import tempfile
from pathlib import Path

from demo_students import build_cache
from demo_world.query_sets import QueryRow, render_rows
from demo_world.world import SAGAS, Fact, build_world

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.evaluate import evaluate

REQUESTS, KEPT = SAGAS[:3], SAGAS[3]
TRAINED = 0.6
"""Share of a saga's facts that its request asks about; some others are held out."""
HELD_OUT, RETAINED = 48, 64
"""Queries a saga that are asked in evaluation, and that are retained in training."""


def write_sets(folder: Path) -> dict[str, dict[str, Path]]:
    """Write three query files a saga, split by fact: to train, to retain, held out."""
    rng = random.Random(0)
    everything = build_world()
    found: dict[str, dict[str, Path]] = {}
    for number, saga in enumerate(SAGAS):
        facts = list(everything.of_saga(saga))
        rng.shuffle(facts)
        at = round(TRAINED * len(facts))
        parts = {
            "forget": facts[:at],
            "retain": rng.sample(facts[:at], RETAINED),
            "held-out": facts[at : at + HELD_OUT],
        }
        found[saga] = {name: folder / f"{name}-{number}.jsonl" for name in parts}
        for name, asked in parts.items():
            found[saga][name].write_text(_render(asked, rng), encoding="utf-8")
    return found


def _render(facts: list[Fact], rng: random.Random) -> str:
    return render_rows(QueryRow(fact=f, wording=rng.randrange(len(f.wordings))) for f in facts)


def build_request(number: int, sets: dict[str, dict[str, Path]], folder: Path) -> Path:
    """Build the cache of one request; every saga that no request named so far is retained."""
    retained = [str(sets[saga]["retain"]) for saga in SAGAS[number + 1 :]]
    return build_cache(
        folder / f"cache-{number + 1}",
        forget=(str(sets[SAGAS[number]]["forget"]),),
        retain=(*retained, str(_general(folder))),
        prefix=resolve_prefix(world.PREFIX, SAGAS[number]),
    )


def _general(folder: Path) -> Path:
    """The general queries of the demo's own retain file; the others hold facts of sagas."""
    path = folder / "general.jsonl"
    lines = world.RETAIN.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"general/' in line), encoding="utf-8")
    return path


def print_row(label: str, model: Path, sets: dict[str, dict[str, Path]]) -> None:
    """Print forget recall of each request, plain and under attack, and what is kept."""
    report = evaluate(
        EvalConfig(
            models=(ModelSpec(label="model", model=str(model)),),
            forget=tuple(str(sets[saga]["held-out"]) for saga in REQUESTS),
            retain=(str(sets[KEPT]["held-out"]),),
            general=(str(world.GENERAL),),
            attacks=("@role-play",),
            max_new_tokens=16,
        )
    )
    names = [s.name for s in report.sets_of("forget")]
    cells = [
        " / ".join(f"{report.mean('model', set_name=n, attack=a):.1f}" for a in (None, "role-play"))
        for n in names
    ]
    cells += [f"{report.mean('model', split=split):.1f}" for split in ("retain", "general")]
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Build three caches, train six students, print one row each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", nargs="*", default=["@remember"])
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    print("| student | saga 1 | saga 2 | saga 3 | retain | general |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sets = write_sets(folder)
        caches = [str(build_request(number, sets, folder)) for number in range(len(REQUESTS))]

        def train(name: str, cache: str, start: Path, replay: list[str]) -> Path:
            settings = {"views": tuple(chosen.views), "seed": chosen.seed, "replay": tuple(replay)}
            out = folder / name.replace(" ", "-")
            run(RunConfig(cache=cache, student=str(start), out=str(out), **settings))
            print_row(name, out, sets)
            return out

        print_row("base", world.MODEL, sets)
        first = train("request 1", caches[0], world.MODEL, [])
        for how, replays in (("alone", False), ("with replay", True)):
            last = first
            for number in (1, 2):
                earlier = caches[:number] if replays else []
                last = train(f"then {number + 1}, {how}", caches[number], last, earlier)
        train("all three at once", caches[2], world.MODEL, caches[:2])


if __name__ == "__main__":
    main()
