"""Searched attacks break a prefix on the demo world, and give a model that never knew nothing."""

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from duet_unlearn.cli.distill import main
from duet_unlearn.data import demo_world as world
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.distill.attacking.prompts import open_prompts, render
from duet_unlearn.distill.attacking.soft_tokens import embed, soft_tokens, train_soft_prompt
from duet_unlearn.distill.attacking.suffix import SuffixSearch
from duet_unlearn.distill.relearning.fine_tuning import answer_loss
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.config import parse_models
from duet_unlearn.evaluation.subjects import Subject, open_subject

ROWS = {"base": False, "base + prefix": True}


@pytest.fixture(scope="module")
def base() -> Subject:
    prefix = resolve_prefix(world.PREFIX, world.TOPIC)
    return open_subject(str(world.MODEL), ROWS, dtype="float32", prefix=prefix)


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    return load_queries(str(world.FORGET), split="forget", require_answers=True)


def config_of(**settings) -> AttackConfig:
    models = parse_models([str(world.MODEL)])
    return AttackConfig(models=models, forget=(str(world.FORGET),), **settings)


def test_soft_tokens_are_read_as_the_vectors_that_they_stand_for(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    ids = [5, 9, 30, 41, 7]
    with torch.no_grad(), soft_tokens(model, embed(model, [9, 30])) as soft:
        mixed = torch.tensor([[5, *soft, 41, 7], [soft[1], 5, 9, 30, soft[0]]])
        found = model(mixed).logits
        plain = model(torch.tensor([ids, [30, 5, 9, 30, 9]])).logits
        assert soft == [384, 385]
        settings = {"eos_token_ids": (), "max_new_tokens": 4, "batch_size": 2}
        prompts = [[5, *soft, 41, 7], [soft[0]]]
        answers = generate_answers(model, prompts, **settings)
    torch.testing.assert_close(found, plain)
    assert answers == generate_answers(model, [ids, [9]], **settings)
    with pytest.raises(IndexError):  # the hooks are gone
        model(mixed)


@pytest.mark.parametrize("label", ROWS)
def test_a_prompt_comes_apart_at_the_end_of_the_users_turn(
    base: Subject, queries: list[Query], label: str
) -> None:
    (prompt,) = open_prompts(base, label, queries[:1], suffix_tokens=7)
    assert 7 <= len(prompt.inserted) <= 9
    assert prompt.holding(()) == render(base, label, queries[0])
    text = base.tokenizer.decode(prompt.inserted)
    assert set(text) == {" ", "!"}
    assert prompt.holding(prompt.inserted) == render(base, label, queries[0], text)
    assert base.tokenizer.decode(prompt.before).endswith(queries[0].text)
    assert prompt.answer[-1] == base.ends[0]


def test_the_gradient_is_that_of_each_choice_of_a_token(
    base: Subject, queries: list[Query]
) -> None:
    model = base.load().requires_grad_(False)
    prompts = open_prompts(base, "base", queries[:2], suffix_tokens=4)
    search = SuffixSearch(config_of(), base, "base", model, prompts)
    gradient = search._gradient(prompts)
    weight = model.get_input_embeddings().weight

    def loss(vectors: torch.Tensor) -> float:
        with soft_tokens(model, vectors) as ids:
            return answer_loss(model, [(p.holding(ids), p.answer) for p in prompts]).item()

    vectors, rng, small = embed(model, search.ids), random.Random(0), 1e-2
    for _ in range(5):
        at, token = rng.randrange(len(vectors)), rng.randrange(len(weight))
        step = torch.zeros_like(vectors)
        step[at] = small * weight[token]
        change = (loss(vectors + step) - loss(vectors - step)) / (2 * small)
        assert float(gradient[at, token]) == pytest.approx(change, rel=0.05, abs=2e-3)


def test_a_search_makes_answers_likelier_by_text_that_can_be_typed(
    base: Subject, queries: list[Query], one_thread: None
) -> None:
    model = base.load().requires_grad_(False)
    label = "base + prefix"
    prompts = open_prompts(base, label, queries[:2], suffix_tokens=6)
    config = config_of(suffix_steps=6, suffix_queries=2, candidates=8)
    search = SuffixSearch(config, base, label, model, prompts)
    before = search._losses(prompts, [search.ids])
    suffix = search.run()
    assert search._losses(prompts, [search.ids])[0] < before[0]
    for prompt in prompts:
        assert render(base, label, prompt.query, suffix) == prompt.holding(search.ids)
    again = SuffixSearch(config, base, label, model, prompts)
    assert again.run() == suffix  # the seed decides


def test_a_soft_prompt_fits_its_queries_and_the_weights_stay(
    base: Subject, queries: list[Query], one_thread: None
) -> None:
    model = base.load().requires_grad_(False)
    prompts = open_prompts(base, "base + prefix", queries[:8], suffix_tokens=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(steps: int) -> float:
        config = config_of(soft_tokens=4, soft_steps=steps, batch_size=8)
        vectors = train_soft_prompt(config, model, prompts)
        assert vectors.shape == (4, 192)
        with torch.no_grad(), soft_tokens(model, vectors) as ids:
            return answer_loss(model, [(p.holding(ids), p.answer) for p in prompts]).item()

    assert loss(20) < loss(0) / 2
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_soft_prompts_rate_is_that_of_the_vectors_a_model_reads(
    base: Subject, queries: list[Query], one_thread: None
) -> None:
    """Gemma 3 multiplies the rows of its embedding by the root of their width."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    prompts = open_prompts(base, "base", queries[:2], suffix_tokens=4)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(base.tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
        )
    ).requires_grad_(False)
    start, one = (
        train_soft_prompt(config_of(soft_tokens=4, soft_steps=n, soft_rate=0.5), model, prompts)
        for n in (0, 1)
    )
    size = embed(model, range(len(base.tokenizer))).square().mean().sqrt()
    # The first step of Adam moves every entry by its rate.
    assert float((one - start).abs().median() / size) == pytest.approx(0.5, rel=1e-2)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_attacks_break_the_prefix_and_teach_nothing(
    tiny_model: Path, tmp_path: Path, one_thread: None
) -> None:
    out = tmp_path / "attack.json"
    words = [f"base={world.MODEL}", f"never={tiny_model}", "--forget", world.FORGET_HELDOUT]
    words += ["--train", world.FORGET, "--retain", world.RETAIN_HELDOUT, "--limit", 12]
    words += ["--suffix-steps", 2, "--soft-steps", 25, "--candidates", 4, "--max-new-tokens", 8]
    words += ["--prefix", world.PREFIX, "--topic", world.TOPIC, "--out", out]
    result = invoke("attack", *words)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    found = {(row["model"], row["attack"]): row for row in document["attacking"]}
    assert len(found) == 9
    hidden, soft = found["base + prefix", "none"], found["base + prefix", "soft prompt"]
    assert hidden["recalled"]["mean"] < 10
    assert hidden["retained"]["mean"] > 90
    assert soft["recalled"]["mean"] > 80
    assert soft["loss"] < hidden["loss"] / 4
    assert found["never", "soft prompt"]["named"]["mean"] == 0.0
    assert found["base", "none"]["recalled"]["mean"] > 95
    assert found["base", "suffix"]["suffix"] in result.stdout.replace("\\\\", "\\")
    # What is asked was not trained on: "another wording" asks for the trained facts.
    answers = {query["answer"] for query in document["asked"] if query["split"] == "forget"}
    trained = load_queries(str(world.FORGET), split="forget", require_answers=True)
    assert not answers & {query.answer for query in trained}
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("base + prefix  ")]
    assert row.split()[3:6] == [
        f"{found['base + prefix', attack]['recalled']['mean']:.1f}"
        for attack in ("none", "suffix", "soft prompt")
    ]
    report = invoke("report", out, "--out", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    assert report.exit_code == 0, report.output
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "suffix found for base + prefix" in page
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert f"| {soft['recalled']['mean']:.1f} (" in text


def test_failures_are_one_line(tiny_model: Path, write_queries, tmp_path: Path) -> None:
    forget = write_queries("forget", 4)
    for words, expected in (
        (["--forget", forget, "--train", forget], "leaves 0 of 4 forget queries to ask"),
        (["--forget", forget, "--share", 1], "leaves 0 of 4 forget queries to ask"),
        (["--forget", forget, "--suffix-steps", 0, "--soft-steps", 0], "both 0"),
        (["--forget", forget, "--max-new-tokens", 250], "do not fit into the 256"),
        (["--forget", write_queries("bare", 2, answers=False)], "no answer"),
        (["--forget", forget, "--out", tmp_path], "a folder"),
    ):
        result = invoke("attack", tiny_model, *words)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr
    assert invoke("attack", tiny_model).exit_code == 2
