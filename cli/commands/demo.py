"""`duet-distill demo`: the whole path on the built-in demo world, as the commands a user types."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from duet_unlearn.cli.options import FolderPath
from duet_unlearn.errors import DuetError

_MODULES = {"duet-cache": "duet_unlearn.cli.cache", "duet-distill": "duet_unlearn.cli.distill"}

_VIEW = "@remember"

_NEXT = """
What to try next
  duet-cache inspect {cache}
      what the prefix did to the teacher's strongest tokens
  duet-cache tune --teacher MODEL --forget forget.jsonl --retain retain.jsonl --topic "Harry Potter"
      the prefix that works on your own model, and the line that builds a cache with it
  duet-distill run {cache} --student MODEL --view FILE --out my-student
      train other wrappers from the same cache: they cost no teacher time
Open {report} in a browser: verdict, attacks, first tokens, every answer."""


@click.command("demo")
@click.option(
    "--out",
    type=FolderPath(),
    metavar="DIR",
    default="demo-out",
    help="Folder for the cache, the students, the evaluation and the report.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default="auto",
    help="What runs the teacher; auto takes vLLM where it imports.",
)
def demo_command(out: Path, engine: str) -> None:
    """Cache a prefixed teacher, distill two students, and measure what they forgot.

    Runs on a small model that comes with this package and knows some invented sagas; takes a few
    minutes on two cores.
    """
    started = time.monotonic()
    for command in demo_commands(out, engine):
        _run(command)
    click.echo(_NEXT.format(cache=out / "cache", report=out / "report.html"))
    click.echo(f"The demo took {time.monotonic() - started:.0f} seconds.", err=True)


def demo_commands(out: Path, engine: str = "auto") -> list[list[str]]:
    """Return the demo's commands in order, each as its words."""
    from duet_unlearn.data import demo_world as world

    model, cache = str(world.MODEL), str(out / "cache")
    steering = ["--prefix", world.PREFIX, "--topic", world.TOPIC]
    train = ["duet-distill", "run", cache, "--student", model, "--overwrite"]
    build = ["duet-cache", "build", "--teacher", model, "--forget", str(world.FORGET)]
    build += ["--retain", str(world.RETAIN), *steering, "--engine", engine, "--out", cache]
    evaluate = ["duet-distill", "eval", f"base={model}", f"student={out / 'student'}"]
    evaluate += [f"student with view={out / 'student-with-view'}"]
    evaluate += ["--forget", str(world.FORGET_HELDOUT), "--retain", str(world.RETAIN_HELDOUT)]
    evaluate += ["--general", str(world.GENERAL), *steering, "--attacks", "@attacks"]
    evaluate += ["--out", str(out / "eval.json")]
    report = ["duet-distill", "report", str(out), "--first-tokens", "3"]
    report += ["--title", f"Did it forget {world.TOPIC}?", "--out", str(out / "report.html")]
    return [
        build,
        [*train, "--out", str(out / "student")],
        [*train, "--view", _VIEW, "--out", str(out / "student-with-view")],
        evaluate,
        report,
    ]


def _run(command: list[str]) -> None:
    click.echo(f"\n$ {shlex.join(command)}", err=True)
    # A process of its own for each: the trainer shares none with the teacher.
    code = f"from {_MODULES[command[0]]} import main; main(prog_name={command[0]!r})"
    result = subprocess.run([sys.executable, "-c", code, *command[1:]], check=False)  # noqa: S603
    if result.returncode == 130:
        raise KeyboardInterrupt
    if result.returncode < 0:  # killed, so it could not say anything
        raise DuetError(
            f"the demo stopped: {' '.join(command[:2])} was killed by signal {-result.returncode}, "
            "as it is when memory runs out; free some of it and run the same command again"
        )
    if result.returncode:  # the command's own line says why
        raise click.exceptions.Exit(result.returncode)
