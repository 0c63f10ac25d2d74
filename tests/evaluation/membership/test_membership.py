"""Membership on the demo world's model, which knows its texts and none that are invented here."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from duet_unlearn.cli.distill import main
from duet_unlearn.data import demo_world as world
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.evaluation.membership.membership import view_texts
from duet_unlearn.evaluation.membership.scores import SCORES, TextView
from duet_unlearn.evaluation.statistics import separate

VIEW = TextView(
    text="aaaaaaaaaa",
    log_probabilities=(-4.0, -1.0, -3.0, -2.0, -5.0, -1.0, -1.0, -1.0, -1.0, -1.0),
    means=(-2.0,) * 9 + (-0.5,),
    deviations=(2.0,) * 4 + (4.0,) + (2.0,) * 4 + (0.25,),
)


def test_scores_by_hand() -> None:
    found = {name: score.score(VIEW) for name, score in SCORES.items()}
    assert found["loss"] == pytest.approx(-2.0)
    assert found["zlib"] == pytest.approx(-2.0 / len(zlib.compress(b"aaaaaaaaaa")))
    assert found["min_k"] == pytest.approx((-5.0 - 4.0) / 2)  # the lowest two of ten
    # (x - mean) / deviation: -1, .5, -.5, 0, -.75, .5 ..., and -2 at the end.
    assert found["min_k_plus"] == pytest.approx((-2.0 - 1.0) / 2)


def test_short_texts_have_a_lowest_token() -> None:
    short = TextView(text="a", log_probabilities=(-3.0, -1.0), means=(0, 0), deviations=(0, 1))
    assert SCORES["min_k"].score(short) == -3.0
    assert math.isfinite(SCORES["min_k_plus"].score(short))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_views_are_those_of_each_text_alone(tiny_model: Path, batch_size: int) -> None:
    model = load_model(tiny_model)
    ids = [[0, 9, 30, 41], [7, 8], [50, 60, 70, 80, 90, 100]]
    views = view_texts(model, ["a", "b", "c"], ids, batch_size=batch_size)
    for row, view in zip(ids, views, strict=True):
        with torch.no_grad():
            logs = model(torch.tensor([row])).logits[0].log_softmax(-1).double()
        for at, token in enumerate(row[1:]):
            here, p = logs[at].numpy(), logs[at].exp().numpy()
            mean = float((p * here).sum())
            assert view.log_probabilities[at] == pytest.approx(float(here[token]), abs=1e-4)
            assert view.means[at] == pytest.approx(mean, abs=1e-4)
            deviation = math.sqrt(float((p * (here - mean) ** 2).sum()))
            assert view.deviations[at] == pytest.approx(deviation, abs=1e-3)
        assert len(view.means) == len(row) - 1


def test_separation_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.8, 1, 60).round(1), rng.normal(0, 1, 40).round(1)
    found = separate(first, second)
    pairs = [(a > b) + 0.5 * (a == b) for a in first for b in second]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    assert (found.count, found.against) == (60, 40)
    assert found.low < found.auc < found.high
    # The normal interval of DeLong's variance is as wide, within a fifth.
    by_first = [np.mean((a > second) + 0.5 * (a == second)) for a in first]
    by_second = [np.mean((first > b) + 0.5 * (first == b)) for b in second]
    half = 1.96 * math.sqrt(np.var(by_first, ddof=1) / 60 + np.var(by_second, ddof=1) / 40)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.2)


def test_groups_apart_leave_the_interval_open() -> None:
    found = separate(np.array([2.0, 3.0, 4.0]), np.array([0.0, 1.0]))
    assert (found.auc, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025**0.5)
    assert separate(np.zeros(3), np.zeros(3)).auc == 0.5


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def invented(tmp_path: Path) -> Path:
    """Texts of the kind of the demo world's, each answer that of another query."""
    path = tmp_path / "invented.jsonl"
    rows = [json.loads(line) for line in world.FORGET_HELDOUT.read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    turned = [*answers[7:], *answers[:7]]
    rows = [{"query": r["query"], "answer": a} for r, a in zip(rows, turned, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_base_tells_its_texts_and_a_random_model_does_not(
    tiny_model: Path, invented: Path, tmp_path: Path
) -> None:
    out = tmp_path / "membership.json"
    words = ["--forget", world.FORGET_HELDOUT, "--holdout", invented, "--limit", 40, "--out", out]
    result = invoke("membership", f"base={world.MODEL}", f"never={tiny_model}", *words)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    found = {(row["model"], row["score"]): row for row in document["membership"]}
    # It was trained on the answers of conversations, and says so in that form alone.
    assert all(found["base", name]["auc"] > 0.9 for name in SCORES)
    for name in SCORES:
        never = found["never", name]
        assert never["low"] < 0.5 < never["high"]
        assert never["low"] <= never["auc"] <= never["high"]
        assert (never["count"], never["against"]) == (40, 40)
    plain = invoke("membership", f"base={world.MODEL}", *words[:6], "--form", "plain", "--json")
    found_plain = {row["score"]: row["auc"] for row in json.loads(plain.stdout)["membership"]}
    assert found_plain["min_k"] < 0.7
    assert len(document["texts"]) == 80
    assert f"{found['base', 'loss']['auc']:.2f} (" in result.stdout
    report = invoke("report", out, "--out", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    assert report.exit_code == 0, report.output
    for page in ("r.html", "r.md"):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert f"{found['base', 'min_k']['auc']:.2f}" in text


def test_a_kit_names_its_holdout(tiny_model: Path) -> None:
    words = ["--forget", "@star-wars", "--holdout", "@star-wars", "--limit", 4, "--json"]
    result = invoke("membership", tiny_model, *words)
    assert result.exit_code == 0, result.output
    texts = json.loads(result.stdout)["texts"]
    assert [text["id"].split("/")[0] for text in texts] == ["star-wars"] * 4 + ["comet-roads"] * 4


def test_failures_are_one_line(tiny_model: Path, write_queries, tmp_path: Path) -> None:
    forget, holdout = write_queries("forget", 3), write_queries("holdout", 3, "tower")
    bare = write_queries("bare", 2, answers=False)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"query": "many words " * 400, "answer": "yes"}) + "\n")
    for words, expected in (
        (["--forget", forget, "--holdout", forget], "is also one of --forget"),
        (["--forget", bare, "--holdout", holdout], "no answer"),
        (["--forget", forget, "--holdout", long], "expected 2 to 256"),
        (["--forget", forget, "--holdout", holdout, "--out", tmp_path], "a folder"),
    ):
        result = invoke("membership", tiny_model, *words)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr
    assert invoke("membership", tiny_model, "--forget", forget).exit_code == 2
