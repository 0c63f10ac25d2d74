"""`duet-distill ask`: what models say, side by side."""

import json
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.data.models.loading import DTYPES
from duet_unlearn.evaluation.config import ModelSpec

if TYPE_CHECKING:
    from duet_unlearn.evaluation.ask import Asker


@click.command("ask")
@click.argument("words", nargs=-1, required=True, metavar="MODEL... [QUESTION]")
@click.option(
    "--prefix", metavar="TEXT|@NAME", help="Steering prefix: the first MODEL is asked with it too."
)
@click.option("--topic", metavar="TEXT", help="What fills {topic} in the prefix.")
@click.option(
    "--prefix-place",
    type=click.Choice(["system", "user", "raw"]),
    default="system",
    help="Where the prefix stands.",
)
@click.option(
    "--attacks",
    multiple=True,
    metavar="FILE|@NAME",
    help="Also ask in each of these shapes: a text file, a built-in name, @family:NAME or "
    "@attacks. Repeatable.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, help="Longest answer in tokens."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    help="Arithmetic; auto is as stored where the processor has that fast, else float32.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all answers as one JSON document.")
def ask_command(words: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Ask each MODEL the QUESTION and print the answers side by side.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL. Without QUESTION,
    the last word with a blank or a question mark in it, questions are read line by line.
    """
    from duet_unlearn.evaluation.ask import AskConfig, Asker, split_question

    models, question = split_question(words)
    config = AskConfig(models=tuple(ModelSpec.parse(text) for text in models), **settings)
    asker = Asker(config)
    asked = []
    for text in _lines() if question is None else [question]:
        if as_json:
            replies = [
                {"model": r.label, "attack": r.attack, "text": r.text} for r in asker.ask(text)
            ]
            asked.append({"question": text, "answers": replies})
        else:
            _print_answers(asker, text)
    if as_json:
        click.echo(json.dumps(asked, ensure_ascii=False, indent=1))


def _lines() -> Iterator[str]:
    """Questions of standard input, behind a prompt where someone types them."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _print_answers(asker: "Asker", question: str) -> None:
    if asker.streams:
        for _ in asker.ask(question, on_text=lambda text: click.echo(_visible(text), nl=False)):
            click.echo()
        return
    for reply in asker.ask(question):
        under = "" if reply.attack is None else f", {reply.attack}"
        click.echo(click.style(f"{reply.label}{under}", bold=True))
        click.echo(textwrap.indent(_visible(reply.text) or "(nothing)", "    "))


def _visible(text: str) -> str:
    """A model may say what would steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
