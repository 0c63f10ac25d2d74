"""What students are trained for besides DUET's own signal, which test_training.py holds."""

import json
import pkgutil
from pathlib import Path

import pytest
import torch
import yaml

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.distill.batches.sampler import PLAIN, Draw
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives import OBJECTIVES
from duet_unlearn.distill.objectives.base import open_objective
from duet_unlearn.distill.run import run
from duet_unlearn.errors import DataError


@pytest.fixture
def files(write_queries) -> dict:
    return {
        "forget": (str(write_queries("forget", 3)),),
        "retain": (str(write_queries("retain", 4, "river")),),
    }


@pytest.fixture
def descend(tiny_model, files, tmp_path, one_thread):
    """Run gradient difference; three epochs of two steps unless told."""

    def start(name: str = "student", **settings):
        defaults = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
        return run(
            RunConfig(
                objective="gradient-difference",
                student=str(tiny_model),
                out=str(tmp_path / name),
                **{**files, **defaults, **settings},
            )
        )

    return start


def likelihoods(model: Path, file: str) -> list[float]:
    """NLL in nats a token of each answer and the end behind it, computed plainly."""
    renderer, network = PromptRenderer(load_tokenizer(model)), load_model(model, dtype="float32")
    found = []
    for row in map(json.loads, Path(file).read_text().splitlines()):
        prompt = renderer.student_ids([{"role": "user", "content": row["query"]}])
        answer = [*renderer.begun_ids(row["answer"]), 1]
        with torch.no_grad():
            logits = network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        found.append(float(losses))
    return found


def test_a_row_of_gradient_difference_is_the_signed_likelihood_of_its_answer(tiny_model, files):
    config = RunConfig(objective="gradient-difference", student="m", out="o", **files)
    objective = open_objective(config, open_student(str(tiny_model)))
    objective.prepare(PromptRenderer(load_tokenizer(tiny_model)))
    model = load_model(tiny_model, dtype="float32", trainable=True)
    objective.attach(model)
    examples = [objective.dataset[Draw(row, PLAIN, 0.1)] for row in range(7)]
    batch = objective.collate(examples)
    assert batch["weight"].tolist() == pytest.approx([0.1] * 7)
    expected = [-v for v in likelihoods(tiny_model, files["forget"][0])]
    expected += likelihoods(tiny_model, files["retain"][0])
    assert objective.row_losses(model, batch).tolist() == pytest.approx(expected, abs=1e-4)


def test_gradient_difference_needs_answers_and_no_cache(descend, files, tiny_model):
    result = descend()
    assert result.queries == {"forget": 3, "retain": 4}
    before, after = (
        {split: sum(likelihoods(Path(model), path[0])) for split, path in files.items()}
        for model in (tiny_model, result.out)
    )
    assert after["forget"] > before["forget"]
    assert after["retain"] < before["retain"]
    told = json.loads((Path(result.out) / "duet_run.json").read_text())
    assert told["answers"] == told["identity"]["answers"]
    card = (Path(result.out) / "README.md").read_text()
    assert "after unlearning by gradient difference" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["unlearning", "gradient-difference"]
    assert descend().hit


def test_accumulation_does_not_change_gradient_difference(descend):
    whole, cut = descend("whole"), descend("cut", gradient_accumulation_steps=2)
    for split in ("forget", "retain"):
        assert whole.loss[split] == pytest.approx(cut.loss[split], abs=1e-4)


def test_answers_that_are_missing_or_too_long_are_named(descend, write_queries, tmp_path):
    with pytest.raises(DataError, match="answer"):
        descend(forget=(str(write_queries("bare", 2, answers=False)),))
    with pytest.raises(DataError, match="@star-wars: a kit's answers are for evaluation"):
        descend(forget=("@star-wars",))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"id": "x", "query": "Who?", "answer": "a " * 400}) + "\n")
    with pytest.raises(DataError, match=r"query x: \d+ tokens with its answer, but the student"):
        descend(forget=(str(long),))


def test_every_objective_has_its_module():
    for kind in OBJECTIVES.values():
        found = pkgutil.resolve_name(f"duet_unlearn.distill.objectives.{kind.name}")
        assert callable(found.row_losses)
