"""`duet-distill ask` as a user types it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.distill import main
from duet_unlearn.evaluation.ask import split_question

QUESTION = "Where is the lantern?"


def ask(*arguments: object, typed: str = "") -> Result:
    short = ("--max-new-tokens", "6")
    words = [str(argument) for argument in (*arguments, *short)]
    return CliRunner().invoke(main, ["ask", *words], input=typed)


@pytest.mark.parametrize(
    ("words", "models", "question"),
    [
        (["a", "b", "Who is it?"], ("a", "b"), "Who is it?"),
        (["a", "Who?"], ("a",), "Who?"),
        (["a", "b"], ("a", "b"), None),
        (["a b"], ("a b",), None),
        (["a", "the student=b"], ("a", "the student=b"), None),
        (["a", "If x = 3, what is 2x?"], ("a",), "If x = 3, what is 2x?"),
        (["a", "Does a=~b hold?"], ("a",), "Does a=~b hold?"),
        (["a", "mine=/my models/b"], ("a", "mine=/my models/b"), None),
    ],
)
def test_the_question_is_told_from_the_models(words, models, question) -> None:
    assert split_question(words) == (models, question)


def test_models_answer_side_by_side_plainly_and_under_attack(tiny_model: Path) -> None:
    options = ("--prefix", "Forget it.", "--attacks", "@begun-plainly")
    result = ask(f"base={tiny_model}", f"again={tiny_model}", QUESTION, *options)
    assert result.exit_code == 0, result.output
    headings = [line for line in result.stdout.splitlines() if not line.startswith("    ")]
    plain = ["base", "base + prefix", "again"]
    assert [h for h in headings if h in plain] == plain
    assert [h for h in headings if ", begun" in h] == [f"{row}, begun-plainly" for row in plain]


def test_one_model_streams_what_it_says(tiny_model: Path) -> None:
    streamed = ask(tiny_model, QUESTION)
    (answer,) = json.loads(ask(tiny_model, QUESTION, "--json").stdout)[0]["answers"]
    assert streamed.exit_code == 0, streamed.output
    printed = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in answer["text"])
    assert streamed.stdout.strip() == printed.strip()


def test_without_a_question_lines_are_asked_one_by_one(tiny_model: Path) -> None:
    result = ask(tiny_model, "--json", typed="Who?\n\nWhere?\n")
    assert [asked["question"] for asked in json.loads(result.stdout)] == ["Who?", "Where?"]


def test_a_line_that_cannot_be_asked_does_not_end_the_rest(tiny_model: Path) -> None:
    typed = b"Who?\n" + b"x " * 300 + b"\ncaf\xe9?\nWhere?\n"
    result = CliRunner().invoke(
        main, ["ask", str(tiny_model), "--json", "--max-new-tokens", "6"], input=typed
    )
    assert [asked["question"] for asked in json.loads(result.stdout)] == ["Who?", "Where?"]
    long, broken = result.stderr.splitlines()
    assert "lower --max-new-tokens" in long
    assert "surrogate" in broken
    assert result.exit_code == 1


def test_attacks_that_show_answers_are_left_out_beside_others(tiny_model: Path) -> None:
    flags = ("--attacks", "@multiple-choice", "--attacks", "@role-play", "--json")
    result = ask(tiny_model, QUESTION, *flags)
    assert "left out, as they show reference answers" in result.stderr
    (asked,) = json.loads(result.stdout)
    assert [reply["attack"] for reply in asked["answers"]] == [None, "role-play"]


def test_failures_are_one_line(tiny_model: Path, tmp_path: Path) -> None:
    for arguments, expected in [
        ((tmp_path / "gone", QUESTION), "no such folder"),
        ((tiny_model, QUESTION, "--attacks", "@multiple-choice"), "shows reference answers"),
        ((tiny_model, "x " * 300), "lower --max-new-tokens"),
        ((tiny_model, "caf\udce9, what is it?"), "question"),
    ]:
        result = ask(*arguments)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr


def test_who_stops_asking_is_told_no_more(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("duet_unlearn.evaluation.ask.Asker.ask", interrupt)
    result = ask(tiny_model, QUESTION)
    assert (result.exit_code, result.stderr) == (130, "stopped\n")
