"""`duet-distill eval` as a user types it."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.distill import main
from duet_unlearn.data import demo_world as world

# The signal comes while the modules load or the model answers: both are part of the work.
INTERRUPTED = """
import os, signal, sys, threading, time
from duet_unlearn.cli.distill import main

def stop():
    while "duet_unlearn.evaluation.evaluate" not in sys.modules:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=stop, daemon=True).start()
main()
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *(str(argument) for argument in arguments)])


@pytest.fixture
def files(write_queries: Callable[..., Path]) -> list[object]:
    return [
        *("--forget", write_queries("forget", 4), "--retain", write_queries("retain", 3, "river")),
        *("--max-new-tokens", 6),
    ]


def test_table_on_standard_output_and_json_in_a_file(
    tiny_model: Path, files: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    result = invoke(
        *(f"base={tiny_model}", f"again={tiny_model}", *files, "--general", files[1]),
        *("--prefix", "@explicit", "--topic", "lanterns", "--attacks", "@role-play"),
        *("--out", out),
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["forget", "retain", "general", "forget", "retain", "shift"]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["base", "base + prefix", "again"]
    assert "Under attack: forget / retain" in lines
    assert result.stderr == ""  # no progress where no terminal is
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["prefix"].startswith("You are an assistant who has forgotten lanterns.")
    assert len(document["queries"]) == (4 + 3 + 4) + (4 + 3)
    rows = document["queries"][0]["responses"]
    assert rows["base"] == rows["again"]
    assert rows["base"]["text"]
    assert list(tmp_path.glob(".eval*")) == []


def test_json_on_standard_output_is_one_document(tiny_model: Path, files: list[object]) -> None:
    result = invoke(tiny_model, *files, "--json", "--limit", 2)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [s["queries"] for s in document["sets"]] == [2, 2]
    assert document["models"][0]["label"] == tiny_model.name
    assert "Mean ROUGE-L recall" in result.stderr


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_the_same_answers(tiny_model: Path, files: list[object]) -> None:
    said = {}
    for engine in ("transformers", "vllm"):
        result = invoke(tiny_model, *files, "--engine", engine, "--json", "--dtype", "float32")
        assert result.exit_code == 0, result.output
        queries = json.loads(result.stdout)["queries"]
        said[engine] = [query["responses"][tiny_model.name]["text"] for query in queries]
    assert said["vllm"] == said["transformers"]


def test_failures_are_one_line(tiny_model: Path, files: list[object], tmp_path: Path) -> None:
    mine = tmp_path / "notes.json"
    mine.write_text('{"mine": 1}')
    other = tmp_path / "relearn.json"
    other.write_text('{"versions": {"duet-unlearn": "0.1.0"}, "relearning": []}')
    cases = [
        ([tiny_model, *files, "--out", other], "it is no result of this command"),
        ([tmp_path / "gone", *files], "no such folder"),
        ([tiny_model, *files, "--out", mine], "nothing in it shows that duet-unlearn wrote it"),
        ([tiny_model, *files, "--max-new-tokens", 250], "lower --max-new-tokens"),
        ([tiny_model, *files, "--prefix", "@explicit"], "--topic"),
        ([tiny_model, *files, "--attacks", "@gone"], "no such built-in shape"),
        ([tiny_model, *files, "--out", tmp_path / "no" / "x.json"], "make it first"),
        ([tiny_model, *files, "--out", tmp_path], "a folder"),
        ([tiny_model, *files, "--out", "~no-such-user/x.json"], "there is no user"),
        ([tiny_model, tiny_model, *files], "NAME=MODEL"),
        ([tiny_model, *files, "--require", "forget=5"], "expected NAME<NUMBER"),
        ([tiny_model, *files, "--require", "worst<5"], "give --attacks as well"),
        (
            [tiny_model, *files, "--require", "forget.answer_probability<5"],
            "give --measure answer_probability",
        ),
        ([tiny_model, *files, "--require", "gone:forget<5"], "no row 'gone'"),
        ([tiny_model, *files, "--require", "general>5"], "'general' is not measured"),
        ([tiny_model, *files, "--samples", 4], "give --measure sampled_recall"),
        ([tiny_model, *files, "--refusals", tmp_path / "gone"], "no such file"),
    ]
    for arguments, expected in cases:
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr
    assert mine.read_text() == '{"mine": 1}'


def test_a_requirement_that_does_not_hold_exits_1_with_its_number(
    tiny_model: Path, files: list[object]
) -> None:
    held = invoke(tiny_model, *files, "--require", "forget<20, retain.refusal<=0")
    assert held.exit_code == 0, held.output
    broken = invoke(tiny_model, *files, "--require", "forget<20,retain>97", "--json")
    assert broken.exit_code == 1
    assert broken.stderr.splitlines()[-1] == (
        f"error: required, and does not hold: {tiny_model.name}: retain is 0.0, required > 97"
    )
    assert json.loads(broken.stdout)["config"]["require"] == "forget<20,retain>97"


def first_lines(source: Path, target: Path, count: int) -> Path:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:count]), encoding="utf-8")
    return target


def test_students_of_several_seeds_are_one_line(tmp_path: Path, build_tiny_cache) -> None:
    cache = build_tiny_cache(tmp_path / "few", forget=8, retain=8, teacher=str(world.MODEL))
    for seed in ("0", "1"):
        arguments = ["run", cache, "--student", world.MODEL, "--out", tmp_path / seed]
        arguments += [
            "--seed",
            seed,
            "--max-steps",
            "2",
            "--batch-size",
            "4",
            "--noise-alpha",
            "0.9",
        ]
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
    forget = first_lines(world.FORGET_HELDOUT, tmp_path / "forget.jsonl", 8)
    retain = first_lines(world.RETAIN_HELDOUT, tmp_path / "retain.jsonl", 8)
    models = [f"base={world.MODEL}", *(f"student={tmp_path / seed}" for seed in ("0", "1"))]
    result = invoke(
        *models, "--forget", forget, "--retain", retain, "--json", "--max-new-tokens", 8
    )
    assert result.exit_code == 0, result.output
    table = [line.split() for line in result.stderr.splitlines()]
    (line,) = [cells for cells in table if cells and cells[0] == "student"]
    document = json.loads(result.stdout)
    (name,) = document["seeds"]
    assert name["models"] == ["student #1", "student #2"]
    each = [
        score["rouge_l_recall"]
        for score in document["scores"]
        if score["set"] == "retain" and score["kind"] is None and score["model"] != "base"
    ]
    (retained,) = [s["rouge_l_recall"] for s in name["scores"] if s["set"] == "retain"]
    assert retained["mean"] == pytest.approx(sum(each) / 2)
    assert retained["std"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    assert f"{retained['mean']:.1f}" in line


def test_wrong_usage_and_help() -> None:
    assert invoke("model", "--retain", "r.jsonl").exit_code == 2
    help_text = invoke("--help").stdout
    assert "[default: 64" in help_text
    assert "--attacks" in help_text


def test_a_stopped_evaluation_says_so_and_writes_nothing(
    tiny_model: Path, files: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    many = ["--attacks", "@all", "--batch-size", "1", "--out", str(out)]
    arguments = [str(part) for part in (tiny_model, *files, *many)]
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == ("stopped; no part of it is kept, so start it again")
    assert not out.exists()
