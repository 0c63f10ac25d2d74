"""What `diff` says of two caches."""

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from duet_unlearn.cli.commands.sets import diff_command
from duet_unlearn.teacher_cache.diff import diff, render_difference

MakeCache = Callable[..., Path]

ROWS = [("a", "forget", "one"), ("b", "retain", "two"), ("c", "retain", "three")]


def test_the_same_queries_under_other_ids_are_the_same(cache_of_rows: MakeCache) -> None:
    a = cache_of_rows("a", ROWS)
    b = cache_of_rows("b", [(f"x{id_}", split, text) for id_, split, text in ROWS], shard_rows=1)
    difference = diff(str(a), str(b))
    assert difference["same"]
    assert difference["common_queries"] == 3
    assert "recipe   the same" in render_difference(difference)


def test_queries_of_one_side_and_other_recipes_are_named(cache_of_rows: MakeCache) -> None:
    a = cache_of_rows("a", [*ROWS, ("d", "forget", "two")])
    b = cache_of_rows("b", [ROWS[0], ("n", "retain", "new")], prefix="Forget all.")
    difference = diff(str(a), str(b))
    assert not difference["same"]
    assert difference["recipe"] == ['prefix: "Forget." / "Forget all."']
    assert difference["common_queries"] == 1
    # `two` stands in both splits of A: a split is part of what a query is.
    assert {tuple(row.values()) for row in difference["a"]["only_here"]} == {
        ("b", "retain", "two"),
        ("c", "retain", "three"),
        ("d", "forget", "two"),
    }
    new = {"query_id": "n", "split": "retain", "query": "new"}
    assert difference["b"]["only_here"] == [new]


def test_the_text_shows_a_few_and_the_document_all(cache_of_rows: MakeCache) -> None:
    many = [(f"q{i}", "retain", f"query {i}\x1b[31m") for i in range(9)]
    a, b = cache_of_rows("a", [*ROWS, *many]), cache_of_rows("b", ROWS)
    text = CliRunner().invoke(diff_command, [str(a), str(b)])
    assert text.exit_code == 1
    assert "3 in both, 9 only in A, 0 only in B" in text.stdout
    assert "and 4 more; --json lists all" in text.stdout
    assert "\x1b" not in text.stdout
    document = json.loads(CliRunner().invoke(diff_command, [str(a), str(b), "--json"]).stdout)
    assert len(document["a"]["only_here"]) == 9
    assert document["b"]["only_here"] == []


def test_exit_codes_are_those_of_diff(cache_of_rows: MakeCache, tmp_path: Path) -> None:
    a, b = cache_of_rows("a", ROWS), cache_of_rows("b", ROWS[:2])

    def code(*caches: Path) -> int:
        return CliRunner().invoke(diff_command, [str(cache) for cache in caches]).exit_code

    assert code(a, a) == 0
    assert code(a, b) == 1
    assert code(a, tmp_path / "nowhere") == 2
