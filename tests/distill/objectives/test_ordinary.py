"""Ordinary distillation: a student trained along given responses, without a steering prefix."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duet_unlearn.distill.batches.sampler import PLAIN, Draw, epoch_order
from duet_unlearn.distill.config import LOSS_OPTIONS, RunConfig
from duet_unlearn.distill.losses import Loss, scores_of
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives.base import open_objective
from duet_unlearn.distill.run import run
from duet_unlearn.errors import ConfigurationError, MismatchError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig

WORDS = ("lantern", "river", "tower", "keeper")


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("given"), tiny_model)


@pytest.fixture(scope="module")
def ragged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("ragged"), tiny_model, top_p=0.3)


def build_cache(folder: Path, tiny_model: Path, **settings: float | str) -> Path:
    """Ten rows: answers, a talk of two turns, and a page that is cut into stretches."""
    rows = [{"query": f"who is the {word}", "answer": f"the {word} is a"} for word in WORDS]
    turns = [{"role": role, "content": "the river"} for role in ("user", "assistant") * 2]
    rows += [{"messages": turns}, {"text": "the keeper of a lantern " * 20}]
    source = folder / "responses.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = BuildConfig(
        teacher=str(tiny_model),
        prefix=None,
        responses=(str(source),),
        out=folder / "cache",
        engine="transformers",
        top_k=20,
        positions=30,
        logit_dtype="float32",
        **settings,  # type: ignore[arg-type]
    )
    assert build(config).manifest.num_rows == 10
    return config.out


@pytest.fixture(scope="module")
def beginner(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrower model with the teacher's tokenizer, from other noise."""
    return make_model(tmp_path_factory.mktemp("beginner") / "model", seed=5, width=32)


@pytest.mark.parametrize("kept", ["cache", "ragged"])
@pytest.mark.parametrize("loss", list(LOSS_OPTIONS))
def test_losses_are_those_of_all_logits(
    kept: str, beginner: Path, loss: str, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM

    cache = request.getfixturevalue(kept)
    settings = {"cache": str(cache), "student": str(beginner), "out": "none", "loss": loss}
    config = RunConfig(**settings, ce_weight=0.25)  # type: ignore[arg-type]
    objective = open_objective(config, open_student(str(beginner)))
    model = AutoModelForCausalLM.from_pretrained(beginner)
    objective.attach(model)
    rows = epoch_order(objective.order.splits, objective.order.row_groups, seed=0, epoch=0)
    assert sorted(rows.tolist()) == list(range(10))
    examples = [objective.dataset[Draw(int(row), PLAIN, 1.0)] for row in rows]

    found = objective.row_losses(model, objective.collate(examples))

    compare, counts = Loss(name=loss), set()
    for example, row_loss in zip(examples, found.tolist(), strict=True):
        prompt, response = (
            torch.tensor(x.tolist()) for x in (example.prompt_ids, example.response_ids)
        )
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        distances = []
        for t, count in enumerate((example.logits > -math.inf).sum(axis=1)):
            ids = torch.tensor(example.token_ids[t, :count]).long()
            scores = scores_of(logits[t], ids, tail=compare.tail)
            teacher = torch.tensor(example.logits[t, :count]), torch.tensor(example.logsumexp[t])
            distances.append(compare(scores, *teacher))
            counts.add(int(count))
        naive = 0.75 * torch.stack(distances)
        naive = naive + 0.25 * torch.nn.functional.cross_entropy(logits, response, reduction="none")
        assert row_loss == pytest.approx(naive.mean().item(), rel=1e-3)
    assert counts == {20} if kept == "cache" else len(counts) > 3


def learning(cache: Path, student: Path, folder: Path, ce_weight: float = 0.0) -> RunConfig:
    """A run that lowers its loss within seconds."""
    return RunConfig(
        cache=str(cache),
        student=str(student),
        out=str(folder / "student"),
        loss="kl-tail",
        ce_weight=ce_weight,
        learning_rate=5e-3,
        epochs=12,
        batch_size=4,
        logging_steps=2,
    )


def test_a_student_learns_along_given_responses(
    cache: Path, beginner: Path, tmp_path: Path
) -> None:
    config = learning(cache, beginner, tmp_path, ce_weight=0.5)

    result = run(config)

    assert result.queries == {"forget": 0, "retain": 0, "train": 10}
    first, last = result.loss["train"]
    assert last < 0.6 * first
    card = (tmp_path / "student/README.md").read_text()
    assert "distilled from" in card
    assert "50% cross-entropy" in card
    assert "- distillation" in card
    assert "unlearn" not in card.partition("Made by")[0]
    assert run(config).hit


@pytest.fixture(scope="module")
def sampled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("sampled"), tiny_model, keep="sampled")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"loss": loss}, f"loss is {loss}")
            for loss in sorted(LOSS_OPTIONS.keys() - {"kl-tail"})
        ),
        ({"top_k": 5}, "5 of 20 draws"),
        ({"select_entropy": 0.5}, "--select-entropy"),
    ],
)
@pytest.mark.parametrize("role", ["cache", "replay", "eval_cache"])
def test_sampled_tokens_are_for_what_they_estimate(
    sampled: Path,
    cache: Path,
    beginner: Path,
    tmp_path: Path,
    role: str,
    settings: dict[str, object],
    message: str,
) -> None:
    out = tmp_path / "student"
    roles = {"cache": cache, "eval_steps": 2, role: (sampled,) if role == "replay" else sampled}
    if role != "eval_cache":
        del roles["eval_steps"]
    given = {key: tuple(map(str, v)) if isinstance(v, tuple) else v for key, v in roles.items()}
    config = {"loss": "kl-tail", "student": str(beginner), "out": str(out), **given, **settings}
    config |= {key: str(v) for key, v in config.items() if isinstance(v, Path)}

    with pytest.raises(ConfigurationError, match=f"{sampled}: its tokens are sampled.*{message}"):
        run(RunConfig(**config))  # type: ignore[arg-type]

    assert not out.exists()


def test_a_student_learns_from_sampled_tokens(
    sampled: Path, beginner: Path, tmp_path: Path
) -> None:
    config = learning(sampled, beginner, tmp_path)

    first, last = run(config).loss["train"]

    assert last < 0.6 * first
    card = (tmp_path / "student/README.md").read_text()
    assert "trained on its sampled tokens" in card
    assert "tokens that 20 draws found" in card


def test_another_tokenizer_is_refused(
    cache: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", vocab_size=300)
    config = RunConfig(cache=str(cache), student=str(other), out=str(tmp_path / "student"))
    with pytest.raises(MismatchError, match="its tokens are not those of cache"):
        run(config)
