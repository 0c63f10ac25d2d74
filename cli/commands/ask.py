"""`duet-distill ask`: what models say, side by side."""

import io
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.options import SettingsCommand, read_settings
from duet_unlearn.cli.output import json_option, print_json
from duet_unlearn.errors import DataError, StoppedError
from duet_unlearn.evaluation.config import AskConfig, parse_models

if TYPE_CHECKING:
    from duet_unlearn.evaluation.ask import Asker


@click.command("ask", cls=SettingsCommand, settings=AskConfig)
@click.argument("words", nargs=-1, required=True, metavar="MODEL... [QUESTION]")
@json_option
@click.pass_context
def ask_command(ctx: click.Context, /, words: tuple[str, ...], as_json: bool, **_: Any) -> None:
    """Ask each MODEL the QUESTION and print the answers side by side.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL. Without QUESTION,
    the last word if it has a blank in it or ends with a question mark, questions are read line by
    line; one that cannot be asked is reported, and the rest are asked.
    """
    from duet_unlearn.evaluation.ask import Asker, split_question

    models, question = split_question(words)
    config = read_settings(ctx, AskConfig, models=parse_models(models))
    asked, failed = [], False
    try:
        asker = Asker(config)
        for text in _lines() if question is None else [question]:
            try:
                if as_json:
                    replies = [
                        {"model": r.label, "attack": r.attack, "text": r.text}
                        for r in asker.ask(text)
                    ]
                    asked.append({"question": text, "answers": replies})
                else:
                    _print_answers(asker, text)
            except DataError as error:
                if question is not None:
                    raise
                click.echo(f"error: {error}", err=True)
                failed = True
    except KeyboardInterrupt as error:
        raise StoppedError("stopped") from error
    if as_json:
        print_json(asked)
    if failed and not sys.stdin.isatty():
        ctx.exit(1)


def _lines() -> Iterator[str]:
    """Questions of standard input, behind a prompt where someone types them."""
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are told of later
    while True:
        if typed:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            click.echo(err=True, nl=typed)  # behind the last prompt
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
