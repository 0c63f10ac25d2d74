"""The audit runs commands that exist, on queries that tell what was trained from what was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from audit import TESTS, list_commands, parse

from duet_unlearn.cli.distill import main as distill
from duet_unlearn.data import demo_world as world
from duet_unlearn.data.kits import KITS

KIT = ["--forget", "@harry-potter", "--retain", "@harry-potter", "--general", "@harry-potter"]


@pytest.mark.parametrize("size", [[], ["--short"], ["--quick"]])
def test_every_test_is_a_command_with_flags_that_it_has(size: list[str], tmp_path: Path) -> None:
    words = [str(tmp_path), "student=s", "--base", "b", *KIT, "--prefix", "@explicit", *size]
    asked = parse([*words, "--topic", "it", "--holdout", "h", "--flags", "probe=--limit 9"])
    commands = list_commands(asked, tmp_path)
    assert set(commands) <= set(TESTS)
    for name, (command, *rest) in commands.items():
        context = distill.commands[command].make_context(command, list(rest))
        assert context.params["out"] == tmp_path / f"{name}.json"
        assert context.params["words"] == ("base=b", "student=s")
    assert commands["probe"][-4:-2] == ["--limit", "9"]
    assert any(word.endswith("general_heldout.jsonl") for word in commands["relearn"])


def sides_of_membership(words: list[str], out: Path) -> list[list[str]]:
    line = list_commands(parse([str(out), "s=s", "--base", "b", *words]), out)["membership"]
    return [
        [line[at + 1] for at, word in enumerate(line) if word == flag]
        for flag in ("--forget", "--holdout")
    ]


def test_a_kit_is_held_against_its_own_holdout(tmp_path: Path) -> None:
    assert sides_of_membership(KIT, tmp_path) == [["@harry-potter"], ["@harry-potter"]]
    more = [*KIT, "--forget", "own.jsonl"]
    assert sides_of_membership(more, tmp_path) == [["@harry-potter"], ["@harry-potter"]]
    asked = [*more, "--holdout", "h.jsonl"]
    assert sides_of_membership(asked, tmp_path) == [["@harry-potter", "own.jsonl"], ["h.jsonl"]]


def test_queries_without_holdout_are_split_by_what_training_asked(tmp_path: Path) -> None:
    heldout = str(KITS["harry-potter"].files("forget", answers=True)[0])
    (known,), (new,) = sides_of_membership(["--forget", heldout, *KIT[2:]], tmp_path)
    lines = [Path(path).read_text(encoding="utf-8").splitlines() for path in (known, new)]
    texts = [{json.loads(row)["query"] for row in found} for found in lines]
    assert [len(found) for found in texts] == [20, 44]
    assert not texts[0] & texts[1]


def test_without_kinds_and_holdout_there_is_no_membership(tmp_path: Path) -> None:
    words = [str(tmp_path), "s=s", "--base", "b", "--forget", str(world.FORGET)]
    asked = parse([*words, "--retain", str(world.RETAIN), "--leave-out", "attack"])
    assert not {"membership", "attack"} & set(list_commands(asked, tmp_path))


def test_the_demo_worlds_maker_is_found_without_a_search_path(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "unlearning"
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import bench_relearning"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
