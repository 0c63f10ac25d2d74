"""Every test there is on finished students, then one report; all by the product's own commands.

    python benchmarks/unlearning/audit.py OUT --base MODEL NAME=STUDENT ... --forget F --retain F
        [--general F] [--prefix TEXT --topic T] [--never MODEL] [--short | --quick] [--engine vllm]
    python benchmarks/unlearning/audit.py OUT --demo

Attacks and sampled answers, rounded weights, relearning, membership, probes and searched attacks,
then OUT/report.html with its JSON and Markdown. What is in OUT already by the same command is kept,
so a stopped audit resumes; students that were trained anew want another OUT. --demo first trains
three students of the demo world.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.kits import find_kit
from duet_unlearn.evaluation.tasks import load_answered

CACHE, DISTILL = "duet_unlearn.cli.cache", "duet_unlearn.cli.distill"
COMMANDS = "commands.json"
"""What each file in OUT was made by, in how many seconds and with how much memory."""
GIB = 2**20  # of ru_maxrss, which counts KiB
TRAINED_KIND = "another wording"
"""The kind of held-out query that asks a fact of which the training queries ask."""
TESTS = ("eval", "quantized", "relearn", "membership", "probe", "attack")

FULL = {
    "eval": "--attacks @families --measure answer_probability --measure extraction_strength "
    "--measure sampled_recall",
    "quantized": "--quantize int8 --quantize int4",
}
# For a base and a LoRA student of 1.5 billion parameters on two cores. With base + prefix the first
# five but relearning took 37 minutes there; answering through an adapter costs most.
SHORT = {
    "eval": "--attacks @families --limit 20 --max-new-tokens 24 "
    "--measure sampled_recall --samples 4",
    "quantized": "--quantize int4 --limit 20 --max-new-tokens 24",
    "relearn": "--lora-rank 16 --rates 3e-4 --steps 0,5,10 --batch-size 8 --limit 10 "
    "--max-new-tokens 16 --dtype auto",
    "attack": "--suffix-steps 5 --candidates 16 --suffix-queries 2 --soft-steps 10 --batch-size 8 "
    "--limit 12 --max-new-tokens 16",
}
QUICK = {
    "eval": "--attacks @role-play --attacks @begun-plainly --limit 4 --max-new-tokens 8 "
    "--measure sampled_recall --samples 2",
    "quantized": "--quantize int4 --limit 4 --max-new-tokens 8",
    "relearn": "--lora-rank 4 --rates 1e-3 --steps 0,2 --batch-size 4 --limit 4 --max-new-tokens 8 "
    "--dtype auto",
    "membership": "--limit 8",
    "probe": "--limit 16",
    "attack": "--suffix-steps 1 --candidates 4 --suffix-queries 2 --soft-steps 2 --batch-size 4 "
    "--limit 4 --max-new-tokens 8",
}


def main() -> None:
    """Train what the demo needs, run the tests, write the report."""
    asked = parse()
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    if asked.demo:
        _demo(asked, out)
    commands = list_commands(asked, out)
    failed = [name for name, words in commands.items() if not run_step(out, name, DISTILL, words)]
    title = f"What is left of {asked.topic or 'it'}?"
    words = ["report", str(out), "--first-tokens", "3", "--title", title]
    words += ["--out", str(out / "report.html"), "--markdown", str(out / "report.md"), "--json"]
    if not run_step(out, "report", DISTILL, words, keep=False, output=out / "report.json"):
        failed.append("report")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


def list_commands(asked: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """Return the words of each test; every one writes `OUT/NAME.json`.

    Without a holdout, kits take their own; of other queries, `OUT/queries` gets the held-out ones
    split by kind in its place.
    """

    def many(flag: str, values: list[str]) -> list[str]:
        return [word for value in values for word in (flag, value)]

    models = [f"base={asked.base}", *asked.students]
    if asked.never:
        models.append(f"never={asked.never}")
    forget, retain = many("--forget", asked.forget), many("--retain", asked.retain)
    general = many("--general", asked.general)
    steering = ["--prefix", asked.prefix] if asked.prefix else []
    steering += ["--topic", asked.topic] if asked.prefix and asked.topic else []
    steering += ["--prefix-place", asked.prefix_place] if asked.prefix else []
    subjects = [*models, *steering]
    lessons = [*(asked.train or asked.forget), *map(_file, asked.general), *asked.teach]
    texts, new = asked.forget, asked.holdout
    if not new and "membership" not in asked.leave_out:
        kits = [source for source in asked.forget if find_kit(source)]
        texts, new = (kits, kits) if kits else _known_and_new(asked.forget, out)
    commands = {
        "eval": ["eval", *subjects, *forget, *retain, *general, "--engine", asked.engine],
        "quantized": ["eval", *models, *forget, *retain, *general],
        "relearn": ["relearn", *subjects, *forget, *retain, *many("--teach", lessons)],
        "membership": ["membership", *models, *many("--forget", texts), *many("--holdout", new)],
        "probe": ["probe", *subjects, *forget, *retain],
        "attack": ["attack", *subjects, *forget, *retain, *many("--train", asked.train)],
    }
    if not new:
        print("membership: left out, there is no --holdout and no query of another kind")
        del commands["membership"]
    if importlib.util.find_spec("torchao") is None:
        print('quantized: left out, install "duet-unlearn[quantize]"')
        del commands["quantized"]
    flags = QUICK if asked.quick else SHORT if asked.short else FULL
    own = dict(text.partition("=")[::2] for text in asked.flags)
    if unknown := own.keys() - commands.keys():
        sys.exit(
            f"--flags: no test {sorted(unknown)[0]!r}; give TEST=FLAGS, of {', '.join(commands)}"
        )
    return {
        name: [
            *words,
            *shlex.split(f"{flags.get(name, '')} {own.get(name, '')}"),
            *("--out", str(out / f"{name}.json")),
        ]
        for name, words in commands.items()
        if name not in asked.leave_out
    }


def _file(source: str) -> str:
    """Return the file that a kit has of general queries: as a lesson its name is the topic's."""
    kit = find_kit(source)
    return source if kit is None else str(kit.files("general", answers=True)[0])


def _known_and_new(sources: list[str], out: Path) -> tuple[list[str], list[str]]:
    """Split held-out queries by kind: facts that training asks of, and others of the same topic."""
    queries = load_answered(sources, split="forget")
    kinds = {
        "asked-in-training": [q for q in queries if q.kind == TRAINED_KIND],
        "never-asked": [q for q in queries if q.kind and q.kind != TRAINED_KIND],
    }
    if not all(kinds.values()):
        return [], []
    paths = []
    (out / "queries").mkdir(exist_ok=True)
    for name, found in kinds.items():
        path = out / "queries" / f"{name}.jsonl"
        rows = [{"id": q.query_id, "query": q.text, "answer": q.answer} for q in found]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append([str(path)])
    return paths[0], paths[1]


def _demo(asked: argparse.Namespace, out: Path) -> None:
    """Train the demo world's students and fill in what the tests are to look at."""
    from bench_relearning import broad_retain

    asked.base, asked.prefix, asked.topic = str(world.MODEL), world.PREFIX, world.TOPIC
    asked.forget, asked.retain = [str(world.FORGET_HELDOUT)], [str(world.RETAIN_HELDOUT)]
    asked.general, asked.train = [str(world.GENERAL)], [str(world.FORGET)]
    asked.holdout = [str(world.HOLDOUT)]
    broad = broad_retain(out / "retain-broad.jsonl")
    build = ["build", "--teacher", asked.base, "--forget", str(world.FORGET)]
    build += ["--prefix", asked.prefix, "--topic", asked.topic, "--engine", "transformers"]
    noise = "--noise-alpha 0.75 --epochs 60 --batch-size 32 --learning-rate 1e-3 --view none"
    plan = {
        "cache": ["--retain", str(world.RETAIN), "--view", "@view-shapes"],
        "cache-broad": ["--retain", str(broad), "--positions", "32"],
        "student": ["cache", "--view", "none"],
        "student-views": ["cache"],
        "student-noise": ["cache-broad", *noise.split()],
    }
    steps = ["--max-steps", "2"] if asked.quick else []
    if asked.quick:  # what noise shook is not rebuilt then: such a student shows the path alone
        del plan["cache-broad"]
        plan["student-noise"][0] = "cache"
    for name, (first, *words) in plan.items():
        if name.startswith("cache"):
            module, line = CACHE, [*build, first, *words]
        else:
            module = DISTILL
            line = ["run", str(out / first), "--student", asked.base, *words, *steps]
            asked.students.append(f"{name.replace('-', ', ')}={out / name}")
        if not run_step(out, name, module, [*line, "--out", str(out / name)]):
            sys.exit(f"{name} failed; nothing can be tested without it")


def run_step(
    out: Path,
    name: str,
    module: str,
    words: list[str],
    *,
    keep: bool = True,
    output: Path | None = None,
) -> bool:
    """Run a command unless what it makes is there already; return whether it is there now.

    Args:
        out: Folder of the record, in which a command that made its result is looked up.
        name: Of the command in the record.
        module: Of the command.
        words: Its arguments.
        keep: Whether a result by the same command is kept.
        output: File for what it prints; without one, `--out` in `words` is its result.
    """
    record = out / COMMANDS
    done = json.loads(record.read_text(encoding="utf-8"))["commands"] if record.exists() else {}
    print(f"\n$ duet-{module.rpartition('.')[2]} {shlex.join(words)}", flush=True)
    made = output or Path(words[words.index("--out") + 1])
    if keep and made.exists() and done.get(name, {}).get("command") == words:
        print(f"# {name} is there already", flush=True)
        return True
    started = time.perf_counter()
    part = output and output.with_name(f"{output.name}.part")
    with part.open("wb") if part else contextlib.nullcontext() as stream:
        process = subprocess.Popen([sys.executable, "-m", module, *words], stdout=stream)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    took = {
        "seconds": round(time.perf_counter() - started),
        "peak_gib": round(usage.ru_maxrss / GIB, 1),
    }
    print(
        f"# {took['seconds'] / 60:.1f} minutes, peak memory {took['peak_gib']} GiB of one process",
        flush=True,
    )
    if process.returncode == 0:
        if part and output:
            part.rename(output)
        known = done.get(name, {})
        # A command that finds its result there takes next to nothing.
        if known.get("command") != words or known["seconds"] < took["seconds"]:
            done[name] = {"command": words, **took}
        record.write_text(json.dumps({"commands": done}, indent=1), encoding="utf-8")
    return process.returncode == 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="folder for all results")
    parser.add_argument("students", nargs="*", metavar="NAME=STUDENT", help="what is audited")
    parser.add_argument("--demo", action="store_true", help="train and audit the demo world")
    parser.add_argument("--base", help="the model that the students come from")
    parser.add_argument("--never", help="a model of the same kind that never knew the topic")
    for split in ("forget", "retain", "general"):
        parser.add_argument(f"--{split}", action="append", default=[], help="queries, or a kit")
    parser.add_argument("--prefix", help="steering prefix: adds the row base + prefix")
    parser.add_argument("--topic", help="what fills {topic} in the prefix, and the title")
    parser.add_argument("--prefix-place", default="system", help="where the prefix stands")
    many = {"action": "append", "default": []}
    parser.add_argument("--train", **many, help="forget queries with answers, to attack by")
    parser.add_argument("--teach", **many, help="one more lesson: queries, or unrelated text")
    parser.add_argument("--holdout", **many, help="queries of the kind that no model ever saw")
    parser.add_argument("--engine", default="transformers", help="what answers; vllm is faster")
    parser.add_argument("--short", action="store_true", help="for a large model on few cores")
    parser.add_argument("--quick", action="store_true", help="next to nothing, to try the path")
    parser.add_argument("--leave-out", **many, choices=TESTS, help="a test to leave out")
    parser.add_argument("--flags", **many, metavar="TEST=FLAGS", help="further flags of a test")
    asked = parser.parse_intermixed_args(words)
    if not asked.demo and not (asked.base and asked.students and asked.forget and asked.retain):
        parser.error("give --demo, or --base, students, --forget and --retain")
    return asked


if __name__ == "__main__":
    main()
