"""Held-out queries during training: the curve, the best weights, the early stop."""

import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.output import student_folder
from duet_unlearn.distill.training.held_out import HeldOut
from duet_unlearn.errors import ConfigurationError, DataError, StoppedError
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.evaluate import evaluate
from duet_unlearn.evaluation.measures.words import split_words

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def queries(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Held-out queries whose answers are what the base says: it starts with 100 points."""
    folder = tmp_path_factory.mktemp("held-out")
    tokenizer = load_tokenizer(tiny_model)
    renderer, model = PromptRenderer(tokenizer), load_model(tiny_model)
    paths = {}
    for split, word in (("forget", "lantern"), ("retain", "river")):
        texts = [f"Where is {word} {i} kept?" for i in range(12)]
        answers = generate_answers(
            model,
            [renderer.student_ids([{"role": "user", "content": text}]) for text in texts],
            eos_token_ids=[1],
            max_new_tokens=NEW_TOKENS,
            batch_size=12,
        )
        said = [t.strip() for t in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        # A random model also says what holds no word, which nothing can recall.
        rows = [
            {"query": query, "answer": answer}
            for query, answer in zip(texts, said, strict=True)
            if split_words(answer)
        ][:5]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths[f"eval_{split}"] = str(path)
    return paths


@pytest.fixture
def watched(train, queries):
    """Train twelve steps and evaluate every third."""

    def start(name: str = "student", **settings):
        sources = {split: (path,) for split, path in queries.items()}
        return train(name, eval_steps=3, eval_max_new_tokens=NEW_TOKENS, **(sources | settings))

    return start


@pytest.fixture
def dies_while_publishing(monkeypatch: pytest.MonkeyPatch):
    @contextlib.contextmanager
    def dying() -> Iterator[None]:
        def die(*_: object) -> None:
            raise OSError("the machine is gone")

        with monkeypatch.context() as patched:
            patched.setattr(student_folder, "write_card", die)
            yield

    return dying


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def same_weights(first: str | Path, second: str | Path) -> bool:
    one, other = tensors_of(first), tensors_of(second)
    return all(torch.equal(one[name], other[name]) for name in one)


def eval_lines(folder: str | Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (Path(folder) / "duet_log.jsonl").read_text().splitlines())
    return [(e["step"], e["eval_forget"], e["eval_retain"]) for e in lines if "eval_forget" in e]


def loss_lines(folder: str | Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (Path(folder) / "duet_log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_evaluating_changes_nothing_of_the_training(train, watched):
    plain = train("plain")
    last = watched("last", checkpoint_selection="last")
    assert same_weights(plain.out, last.out)
    assert loss_lines(plain.out) == loss_lines(last.out)
    assert (last.steps, last.kept_step) == (12, 12)
    assert [e["step"] for e in last.evaluations] == [0, 3, 6, 9, 12]
    assert last.evaluations[0]["forget"] == last.evaluations[0]["retain"] == 100
    curve = [(e["step"], e["forget"], e["retain"]) for e in last.evaluations]
    assert eval_lines(last.out) == curve
    told = json.loads((Path(last.out) / "duet_run.json").read_text())
    assert told["result"]["evaluations"] == last.evaluations


def test_the_student_is_the_best_step_and_says_so(train, watched, stop_at_pass, tmp_path):
    best = watched("best", eval_retain_drop=50, seed=2)  # whose later steps keep nothing
    allowed = [e for e in best.evaluations[1:] if e["retain"] >= 50]
    lowest = min(e["forget"] for e in allowed)
    assert best.kept_step == max(e["step"] for e in allowed if e["forget"] == lowest)
    assert best.kept_step < best.steps
    # The same steps of the same schedule, stopped there.
    stopping = stop_at_pass(best.kept_step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with stopping, pytest.raises(StoppedError):
        train("there", save_steps=0, seed=2)
    checkpoint = tmp_path / "there.unfinished" / f"checkpoint-{best.kept_step}"
    assert same_weights(best.out, checkpoint)
    card = (Path(best.out) / "README.md").read_text()
    assert f"forget 100.0 to {lowest:.1f}" in card
    assert f"weights of step {best.kept_step} |" in card
    assert f"| this model | {lowest:.1f} | {lowest:.1f} |" in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("best")] == ["best"]


@pytest.mark.parametrize(
    "settings", [{}, {"lora_rank": 4, "lora_extrapolation": 3, "learning_rate": 3e-4}]
)
def test_what_is_measured_is_what_eval_measures(watched, queries, settings):
    result = watched(eval_attacks=("@role-play",), checkpoint_selection="last", **settings)
    report = evaluate(
        EvalConfig(
            models=(ModelSpec(label="student", model=result.out),),
            forget=(queries["eval_forget"],),
            retain=(queries["eval_retain"],),
            attacks=("@role-play",),
            max_new_tokens=NEW_TOKENS,
        )
    )
    last = result.evaluations[-1]
    plain = report.mean("student", split="forget")
    attacked = report.mean("student", split="forget", attack="role-play")
    assert (last["forget_plain"], last["forget"]) == (plain, max(plain, attacked))
    kept = report.mean("student", split="retain")
    attacked = report.mean("student", split="retain", attack="role-play")
    assert (last["retain_plain"], last["retain"]) == (kept, min(kept, attacked))


@pytest.mark.parametrize("at", [5, 8])
def test_a_killed_run_has_every_evaluation_once_and_the_same_student(
    watched, stop_at_pass, tmp_path, at
):
    undisturbed = watched("undisturbed", save_steps=4, eval_retain_drop=100)

    def die() -> None:
        raise OSError("the machine is gone")

    with stop_at_pass(at, die), pytest.raises(OSError, match="gone"):
        watched("killed", save_steps=4, eval_retain_drop=100)
    again = watched("killed", save_steps=4, eval_retain_drop=100)
    assert again.evaluations == undisturbed.evaluations
    assert eval_lines(again.out) == eval_lines(undisturbed.out)
    assert again.kept_step == undisturbed.kept_step
    assert same_weights(undisturbed.out, again.out)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_killed_while_it_publishes_trains_no_further(watched, dies_while_publishing, keep):
    # Step 7 is in the middle of an epoch: the Trainer would do one step more.
    settings = {
        "max_steps": 7,
        "save_steps": 7,
        "checkpoint_selection": keep,
        "eval_retain_drop": 100,
    }
    undisturbed = watched("undisturbed", **settings)

    with dies_while_publishing(), pytest.raises(OSError, match="gone"):
        watched("killed", **settings)
    again = watched("killed", **settings)
    assert (again.steps, again.evaluations) == (7, undisturbed.evaluations)
    assert same_weights(undisturbed.out, again.out)


def test_an_early_stop_ends_the_run_with_a_student(watched, tmp_path, dies_while_publishing):
    settings = {
        "early_stopping_patience": 1,
        "eval_retain_drop": 100,
        "epochs": 30,
        "save_steps": 1,
    }
    result = watched("early", **settings)
    assert result.steps < 120
    assert result.steps == result.evaluations[-1]["step"]
    lowest = min(e["forget"] for e in result.evaluations[1:])
    assert lowest < 100
    assert result.evaluations[-1]["forget"] >= lowest
    assert (Path(result.out) / "duet_run.yaml").is_file()
    assert not (tmp_path / "early.unfinished").exists()

    # Killed while it publishes, it does not go on training either.
    with dies_while_publishing(), pytest.raises(OSError, match="gone"):
        watched("killed", **settings)
    again = watched("killed", **settings)
    assert again.evaluations == result.evaluations
    assert same_weights(result.out, again.out)


def test_asking_leaves_the_model_and_the_random_numbers_alone(tiny_model, queries):
    config = RunConfig(
        cache="c",
        student=str(tiny_model),
        out="o",
        eval_steps=1,
        eval_forget=(queries["eval_forget"],),
        eval_retain=(queries["eval_retain"],),
        eval_max_new_tokens=NEW_TOKENS,
    )
    student, held_out = open_student(str(tiny_model)), HeldOut(config)
    tokenizer = load_tokenizer(tiny_model)
    held_out.prepare(student, PromptRenderer(tokenizer), tokenizer)
    model = load_model(tiny_model, dtype="float32", trainable=True)
    model.train()
    model.config.use_cache = False
    settings = model.generation_config
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]
    assert held_out.measure(model, 3).forget == 100
    assert model.training
    assert model.config.use_cache is False
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_adapter_is_watched_too(watched):
    result = watched(lora_rank=4, learning_rate=1e-2, eval_retain_drop=100)
    assert len(result.evaluations) == 5
    assert (Path(result.out) / "adapter_model.safetensors").is_file()
    merged = watched("merged", lora_rank=4, learning_rate=1e-2, merge=True, eval_retain_drop=100)
    assert (merged.evaluations, merged.kept_step) == (result.evaluations, result.kept_step)
    assert (Path(merged.out) / "model.safetensors").is_file()


def test_held_out_queries_have_to_be_held_out_and_answered(
    watched, train, write_queries, tiny_cache, caplog
):
    seen = write_queries("seen", 3)  # "Who is the keeper of lantern 0?": the cache has them too
    watched(eval_forget=(str(seen),), epochs=1)
    assert "3 of 8 held-out queries are trained on" in caplog.text
    with pytest.raises(DataError, match="answer"):
        watched("none", eval_forget=(str(write_queries("bare", 3, answers=False)),))
    with pytest.raises(ConfigurationError, match="eval_retain is empty, expected held-out"):
        watched("none", eval_retain=())
    with pytest.raises(ConfigurationError, match="early_stopping_patience is 2 without eval_steps"):
        train("none", early_stopping_patience=2)


def test_other_held_out_queries_are_another_run(watched, queries, tmp_path):
    watched(epochs=1)
    assert watched(epochs=1).hit
    other = tmp_path / "other.jsonl"
    other.write_text(Path(queries["eval_forget"]).read_text() + '{"query": "a", "answer": "b"}\n')
    with pytest.raises(ConfigurationError, match=r"another run \(held_out is 'sha256:"):
        watched(epochs=1, eval_forget=(str(other),))
