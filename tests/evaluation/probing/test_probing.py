"""The lens against models cut short, the probe against plain algebra, both on the demo world."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from duet_unlearn.cli.distill import main
from duet_unlearn.data import demo_world as world
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.evaluation.probing.last_position import output_vectors, read_last_positions
from duet_unlearn.evaluation.probing.linear_probe import (
    PENALTY,
    cross_validated,
    pair_queries,
    predict,
    shuffled_control,
    tells_apart,
)

PROMPTS = [[5, 9, 30], [7], [50, 60, 70, 80, 90]]
TOKENS = [11, 300, 4]


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_lens_at_a_layer_is_the_model_cut_behind_it(
    tiny_model: Path, kind: str, batch_size: int
) -> None:
    model = load_model(tiny_model) if kind == "llama" else tiny_gpt2()
    found = read_last_positions(model, PROMPTS, TOKENS, batch_size=batch_size)
    stack = model.model.layers if kind == "llama" else model.transformer.h
    layers = list(stack)
    assert [len(position.ranks) for position in found] == [len(layers)] * 3
    for count in range(len(layers), 0, -1):
        model.config.num_hidden_layers = count
        while len(stack) > count:
            del stack[-1]
        for prompt, token, position in zip(PROMPTS, TOKENS, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt])).logits[0, -1]
            rank = 1 + int((logits > logits[token]).sum())
            assert position.ranks[count - 1] == rank
            share = float(logits.softmax(-1)[token])
            assert position.probabilities[count - 1] == pytest.approx(share, rel=1e-3)
            # The state is what the head reads.
            again = float(position.states[count - 1] @ output_vectors(model, [token])[0])
            assert again == pytest.approx(float(logits[token]), abs=1e-4)


def test_ridge_is_that_of_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    train, targets, asked = (
        rng.normal(size=(9, 4)),
        rng.normal(size=(9, 3)),
        rng.normal(size=(2, 4)),
    )
    center, mean = train.mean(0), targets.mean(0)
    x, y = train - center, targets - mean
    penalty = PENALTY * (x**2).sum() / 9
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(4), x.T @ y)
    expected = (asked - center) @ weights + mean
    assert predict(train, targets, asked) == pytest.approx(expected)
    same = np.ones((3, 4))
    assert predict(same, targets[:3], asked) == pytest.approx(np.tile(targets[:3].mean(0), (2, 1)))


def test_pairs_are_the_most_alike_and_never_of_one_token() -> None:
    angles = np.array([0.0, 10, 12, 90, 91, 91]) * np.pi / 180
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert pair_queries(vectors, [1, 2, 3, 4, 5, 5]) == [(3, 4), (1, 2), (0, 5)]
    assert pair_queries(vectors[4:], [5, 5]) == []


def test_the_probe_finds_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    vectors, kept_vectors = rng.normal(size=(80, 16)), rng.normal(size=(60, 16))
    pairs = pair_queries(vectors, range(80))
    assert len(pairs) == 40
    hidden = rng.normal(size=(16, 24)) / 4  # where a model that knows holds an answer
    # Beside the answer stands what has nothing to do with it, and a shift that is the same for all.
    noise, kept_noise = rng.normal(size=(80, 24)), rng.normal(size=(60, 24))
    states, kept = vectors @ hidden + noise / 4 + 9, kept_vectors @ hidden + kept_noise / 4
    found = tells_apart(predict(kept, kept_vectors, states), vectors, pairs).mean()
    assert found == 1.0
    empty = tells_apart(predict(kept, kept_vectors, noise), vectors, pairs).mean()
    assert 0.25 < empty < 0.75
    assert 0.3 < shuffled_control(kept, kept_vectors, states, vectors, pairs) < 0.7
    kept_pairs = pair_queries(kept_vectors, range(60))
    assert cross_validated(kept, kept_vectors, kept_pairs).mean() > 0.9
    assert cross_validated(kept_noise, kept_vectors, kept_pairs).mean() < 0.75


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_prefix_hides_what_the_layers_hold(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    words = [f"base={world.MODEL}", f"never={tiny_model}", "--forget", world.FORGET_HELDOUT]
    words += ["--retain", world.RETAIN_HELDOUT, "--limit", 48, "--prefix", world.PREFIX]
    result = invoke("probe", *words, "--topic", world.TOPIC, "--out", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    found = {(row["model"], row["layer"]): row for row in document["probing"]}
    assert list(found)[-3:] == [("base + prefix", 4), ("never", 1), ("never", 2)]
    base, prefixed, never = found["base", 4], found["base + prefix", 4], found["never", 2]
    assert base["rank"] == 1
    assert base["probability"]["mean"] > 90
    # The refusal stands before it, and the answer is right behind.
    assert prefixed["rank"] > 1
    assert prefixed["probability"]["mean"] < 10
    assert prefixed["retain_probability"]["mean"] > 90
    assert never["rank"] > 20
    for row in (base, prefixed):
        assert row["told_apart"]["mean"] > 85
        assert row["told_apart"]["count"] == document["pairs"]["forget"]
        assert 25 < row["shuffled"] < 75
        assert row["retain_told_apart"]["mean"] > 75
    assert never["told_apart"]["low"] < 50 < never["told_apart"]["high"]
    assert len(document["queries"]) == 96
    assert len(document["queries"][0]["lens"]["never"]["ranks"]) == 2
    # A model of fewer layers leaves its column blank; the last row is the base's last layer.
    (line, _) = (row for row in result.stdout.splitlines() if row.startswith("layer 4"))
    assert line.split()[2:4] == ["1", f"{base['probability']['mean']:.1f}"]
    assert line.split()[-2:] == ["-", "-"]
    report = invoke("report", out, "--out", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    assert report.exit_code == 0, report.output
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3  # rank, pairs of forget queries, pairs of retain queries
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert f"| base + prefix | 4 | {prefixed['rank']:g} |" in text


def test_without_a_template_the_space_before_the_answer_is_passed_over(tmp_path: Path) -> None:
    # The demo world's tokenizer writes it as a token: the same one for every answer.
    model, out = tmp_path / "model", tmp_path / "probe.json"
    shutil.copytree(world.MODEL, model)
    (model / "chat_template.jinja").unlink()
    words = [model, "--forget", world.FORGET_HELDOUT, "--retain", world.RETAIN_HELDOUT]
    result = invoke("probe", *words, "--limit", 24, "--out", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    last = document["probing"][-1]
    assert last["layer"] == 4
    assert last["rank"] < 40  # of 2,400: it was raised in chats, but knows the answers
    assert last["told_apart"]["mean"] > 60


def test_failures_are_one_line(tiny_model: Path, write_queries, tmp_path: Path) -> None:
    forget, retain = write_queries("forget", 4), write_queries("retain", 4, "tower")
    bare = write_queries("bare", 2, answers=False)
    same = tmp_path / "same.jsonl"
    rows = [{"query": f"Who is {i}?", "answer": "Yes."} for i in range(9)]
    same.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for words, expected in (
        (["--forget", same, "--retain", retain], "9 forget queries make 0 pairs"),
        (["--forget", bare, "--retain", retain], "no answer"),
        (["--forget", forget, "--retain", retain, "--topic", "x"], "topic is set without a prefix"),
        (["--forget", forget, "--retain", retain, "--out", tmp_path], "a folder"),
    ):
        result = invoke("probe", tiny_model, *words)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr
    assert invoke("probe", tiny_model, "--forget", forget).exit_code == 2
