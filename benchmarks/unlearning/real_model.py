"""A topic out of a real model, from start to end: every command with its time and peak memory.

    python benchmarks/unlearning/real_model.py MODEL OUT [--kit NAME] [--topic TEXT]
        [--variant "one position=--positions 1"] [--attacks @families] [--leave-out]
        [--build "--strength 2 --reuse CACHE"]

Chooses a prefix, builds a cache, trains a LoRA student by default settings and evaluates it on the
kit's held-out queries, plain and in every family of attacks. Each --variant trains one more student
with further flags of `duet-distill run` and puts it beside the others. With --leave-out it also
trains one student without each family of training shapes in turn and evaluates it in that family.
What is there already in OUT is found again, so a stopped run resumes.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from audit import CACHE, DISTILL, run_step

from duet_unlearn.data.shape_catalogue import VIEW_SHAPES

NEW_TOKENS = "24"
LORA = ("--lora-rank", "16")


def main() -> None:
    """Run every step."""
    arguments = _arguments()
    model, out, kit = arguments.model, Path(arguments.out), f"@{arguments.kit}"
    out.mkdir(parents=True, exist_ok=True)
    queries = ("--forget", kit, "--retain", kit)
    tuned, cache = out / "tuned.json", out / "cache"

    def step(name: str, module: str, *words: str, output: Path | None = None) -> None:
        # What is finished already is found by the commands themselves, all but that of `tune`.
        if not run_step(out, name, module, list(words), keep=name == "tune", output=output):
            sys.exit(f"{name} failed; the same command goes on from there")

    words = ("tune", "--teacher", model, *queries, "--topic", arguments.topic, "--json")
    step("tune", CACHE, *words, output=tuned)
    words = ("build", "--teacher", model, *queries, "--prefix-from", str(tuned))
    step("build", CACHE, *words, *shlex.split(arguments.build), "--out", str(cache))

    def train(name: str, *flags: str) -> str:
        where = str(out / name.replace(" ", "-"))
        step(name, DISTILL, "run", str(cache), "--student", model, *flags, "--out", where)
        return f"{name}={where}"

    def evaluate(name: str, students: Sequence[str], *attacks: str) -> None:
        given = [word for attack in attacks for word in ("--attacks", attack)]
        words = (*queries, "--general", kit, *given, "--max-new-tokens", NEW_TOKENS)
        document = ("--engine", arguments.engine, "--out", str(out / f"{name}.json"))
        step(name, DISTILL, "eval", *students, *words, *document)

    variants = {"student": LORA}
    for text in arguments.variant:
        name, _, flags = text.partition("=")
        variants[name] = shlex.split(flags)
    students = [train(name, *flags) for name, flags in variants.items()]
    evaluate("eval", [f"base={model}", *students], *arguments.attacks)
    for family in sorted(
        {shape.family for shape in VIEW_SHAPES.values()} if arguments.leave_out else ()
    ):
        views = [name for name, shape in VIEW_SHAPES.items() if shape.family != family]
        given = [word for view in views for word in ("--view", f"@{view}")]
        student = train(f"without {family}", *LORA, *given)
        evaluate(f"without-{family}", [student], f"@family:{family}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument("out", help="folder for everything that is made")
    parser.add_argument("--kit", default="harry-potter", help="a built-in query kit")
    parser.add_argument("--topic", default="Harry Potter", help="what the prefix names")
    parser.add_argument("--engine", default="vllm", help="what answers in the evaluation")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="train one more student with these flags alone",
    )
    parser.add_argument("--build", default="", metavar="FLAGS", help="further flags of the build")
    parser.add_argument("--attacks", nargs="*", default=["@families"], help="what attacks them")
    parser.add_argument("--leave-out", action="store_true", help="also leave out each family")
    return parser.parse_args()


if __name__ == "__main__":
    main()
