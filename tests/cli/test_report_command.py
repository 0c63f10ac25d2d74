"""`duet-distill report` as a user types it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.distill import main


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tiny_model: Path, write_queries, tmp_path: Path) -> Path:
    words = ["--forget", write_queries("forget", 3), "--retain", write_queries("retain", 3)]
    words += ["--max-new-tokens", 3, "--out", tmp_path / "eval.json"]
    result = invoke("eval", f"base={tiny_model}", f"again={tiny_model}", *words)
    assert result.exit_code == 0, result.output
    return tmp_path


def test_page_markdown_and_json(folder: Path) -> None:
    page, text = folder / "report.html", folder / "report.md"
    words = ["report", folder, "--out", page, "--markdown", text]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"The page is {page}."
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert text.read_text(encoding="utf-8").startswith("# Did it forget?")
    again = invoke(*words, "--json")  # its own page is replaced
    assert json.loads(again.stdout)["evaluations"][0]["labels"] == ["base", "again"]


def test_failures_are_one_line_and_write_nothing(folder: Path) -> None:
    foreign = folder / "index.html"
    foreign.write_text("<p>mine</p>")
    cases = [
        ([folder, "--out", foreign], "nothing in it shows that duet-unlearn wrote it"),
        ([folder, "--out", folder / "x.html", "--markdown", foreign], "nothing in it shows"),
        ([folder, "--out", folder], "a folder"),
        ([folder, "--out", folder / "x.html", "--markdown", folder / "x.html"], "the page goes"),
        ([folder, "--out", folder / "no" / "x.html"], "make it first"),
        ([folder / "gone", "--out", folder / "x.html"], "cannot be read"),
    ]
    if Path("/proc/self").is_dir():  # a folder in which nobody can make a file
        unwritable = [folder, "--out", folder / "x.html", "--markdown", "/proc/x.md"]
        cases.append((unwritable, "cannot be written"))
    for arguments, expected in cases:
        result = invoke("report", *arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr
    assert foreign.read_text() == "<p>mine</p>"
    assert not (folder / "x.html").exists()


def test_what_a_foreign_evaluation_says_cannot_steer_a_terminal(folder: Path) -> None:
    path = folder / "eval.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"again"', '"a\\u001b[2Jgain"'))
    result = invoke("report", path, "--out", folder / "x.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("a\\x1b[2Jgain: ")
