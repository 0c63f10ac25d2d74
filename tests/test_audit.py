"""The audit runs commands that exist, on queries that tell what was trained from what was not."""

import json
from pathlib import Path

import pytest
from audit import TESTS, list_commands, parse

from duet_unlearn.cli.distill import main as distill
from duet_unlearn.data import demo_world as world

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


def test_a_kit_without_holdout_is_split_by_what_training_asked(tmp_path: Path) -> None:
    line = list_commands(parse([str(tmp_path), "s=s", "--base", "b", *KIT]), tmp_path)["membership"]
    known, new = (line[line.index(flag) + 1] for flag in ("--forget", "--holdout"))
    lines = [Path(path).read_text(encoding="utf-8").splitlines() for path in (known, new)]
    texts = [{json.loads(row)["query"] for row in found} for found in lines]
    assert [len(found) for found in texts] == [20, 44]
    assert not texts[0] & texts[1]


def test_without_kinds_and_holdout_there_is_no_membership(tmp_path: Path) -> None:
    words = [str(tmp_path), "s=s", "--base", "b", "--forget", str(world.FORGET)]
    asked = parse([*words, "--retain", str(world.RETAIN), "--leave-out", "attack"])
    assert not {"membership", "attack"} & set(list_commands(asked, tmp_path))
