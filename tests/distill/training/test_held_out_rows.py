"""The loss on a held-out cache during training: the curve, the best weights, the early stop."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from duet_unlearn.cli.commands.run import run_command
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.losses import Loss, scores_of
from duet_unlearn.distill.run import run
from duet_unlearn.distill.training.checkpoint_selection import HeldOutLoss, LowestLoss
from duet_unlearn.errors import ConfigurationError, MismatchError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.reader import CacheReader

Runs = Callable[..., object]


@pytest.fixture(scope="module")
def caches(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Six rows to train on and three others, of several lengths."""
    folder = tmp_path_factory.mktemp("given")
    words = ("lantern", "river", "tower", "keeper", "name", "question")
    texts = {
        "cache": [f"who is the {word} of the river" for word in words],
        "eval_cache": [f"where is a {word} " * n for n, word in enumerate(words[:3], 1)],
    }
    for name, rows in texts.items():
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        build_along(source, tiny_model, folder / name)
    return {name: str(folder / name) for name in texts}


def build_along(texts: Path, teacher: Path, out: Path, **settings) -> str:
    defaults = {"engine": "transformers", "top_k": 20, "logit_dtype": "float32"}
    given = {"teacher": str(teacher), "prefix": None, "responses": (str(texts),), "out": out}
    build(BuildConfig(**(defaults | given | settings)))
    return str(out)


@pytest.fixture
def watched(caches, make_model, tmp_path: Path, one_thread: None):
    """Twelve steps of two rows from other noise than the teacher's, evaluated every third."""
    student = make_model(tmp_path / "other", seed=3)

    def start(name: str = "student", **settings):
        defaults = {"student": str(student), "out": str(tmp_path / name), "batch_size": 2}
        defaults |= {"loss": "kl-tail", "epochs": 4, "eval_steps": 3, "learning_rate": 1e-3}
        return run(RunConfig(**(defaults | caches | settings)))

    return start


def directly(model_folder: str, cache: str, loss: str) -> tuple[float, float]:
    """Return the means over a cache's rows from a plain forward pass of each."""
    from transformers import AutoModelForCausalLM

    model, compare, found = AutoModelForCausalLM.from_pretrained(model_folder), Loss(name=loss), []
    reader = CacheReader.open(cache)
    for row in map(reader.row, range(reader.num_rows)):
        prompt, response = (torch.tensor(x.tolist()) for x in (row.prompt_ids, row.response_ids))
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        scores = scores_of(logits, torch.tensor(row.token_ids).long(), tail=compare.tail)
        losses = compare(scores, torch.tensor(row.logits), torch.tensor(row.logsumexp))
        found.append((losses.mean(), torch.nn.functional.cross_entropy(logits, response)))
    return tuple(torch.tensor(found).mean(dim=0).tolist())


@pytest.mark.parametrize(("loss", "share"), [("kl-tail", 0.0), ("huber", 0.5)])
def test_what_is_measured_is_the_loss_of_plain_forward_passes(watched, caches, loss, share):
    # Trained on a fifth of the positions, evaluated on all of them.
    result = watched(
        loss=loss, ce_weight=share, checkpoint_selection="last", select_entropy=0.2, eval_steps=12
    )
    student = str(Path(result.out).parent / "other")
    for found, folder in zip(result.evaluations, (student, result.out), strict=True):
        plain, cross_entropy = directly(folder, caches["eval_cache"], loss)
        assert found["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-4)
        wanted = (1 - share) * plain + share * cross_entropy
        assert found["loss"] == pytest.approx(wanted, rel=1e-4)


def test_the_loss_is_that_of_the_adapter_as_it_is_trained(watched, caches):
    settings = {"lora_rank": 4, "merge": True, "learning_rate": 1e-2}
    one, three = (watched(f"{f}", lora_extrapolation=f, **settings) for f in (1, 3))
    assert one.evaluations == three.evaluations
    of_saved = [directly(r.out, caches["eval_cache"], "kl-tail")[0] for r in (one, three)]
    kept = next(e["loss"] for e in one.evaluations if e["step"] == one.kept_step)
    assert kept == pytest.approx(of_saved[0], rel=1e-4)
    assert kept != pytest.approx(of_saved[1], rel=1e-2)


def test_the_student_is_the_step_of_the_lowest_loss(watched, caches, tmp_path):
    last = watched("last", checkpoint_selection="last")
    plain = watched("plain", eval_steps=0, eval_cache=None)
    same = [Path(r.out, "model.safetensors").read_bytes() for r in (last, plain)]
    assert same[0] == same[1]
    assert [e["step"] for e in last.evaluations] == [0, 3, 6, 9, 12]
    # So fast that it is soon worse on rows that it does not see.
    best = watched("best", learning_rate=0.05)
    losses = {e["step"]: e["loss"] for e in best.evaluations[1:]}
    assert best.kept_step == min(losses, key=lambda step: losses[step])
    assert best.kept_step < best.steps
    wanted, _ = directly(best.out, caches["eval_cache"], "kl-tail")
    assert losses[best.kept_step] == pytest.approx(wanted, rel=1e-4)
    stopped = watched("stopped", learning_rate=0.05, early_stopping_patience=1)
    assert stopped.steps < best.steps
    card = (tmp_path / "best/README.md").read_text()
    assert f"loss {best.evaluations[0]['loss']:.4f} to {losses[best.kept_step]:.4f}" in card
    settings = yaml.safe_load((tmp_path / "best/duet_run.yaml").read_text())
    digest = CacheReader.open(caches["eval_cache"]).manifest.digest
    assert settings["eval_cache"].endswith(f"@{digest}")


def test_the_command_prints_the_curve(watched, caches, tmp_path):
    result = watched()
    arguments = ["--student", str(tmp_path / "other"), "--out", result.out, "--batch-size", "2"]
    arguments += ["--loss", "kl-tail", "--epochs", "4", "--eval-steps", "3"]
    arguments += ["--learning-rate", "0.001", "--eval-cache", caches["eval_cache"]]
    printed = CliRunner().invoke(run_command, [caches["cache"], *arguments]).stdout
    assert "held-out rows\n  step  loss  cross_entropy\n" in printed
    assert f"     0  {result.evaluations[0]['loss']:.4f}" in printed


def test_rows_are_spread_by_the_limit(watched, caches):
    few = watched("few", eval_limit=1, eval_steps=12)
    assert few.evaluations[0] != watched("all", eval_steps=12).evaluations[0]


def test_a_held_out_cache_of_more_draws_is_taken_whole(watched, caches, tiny_model, tmp_path):
    few, many = (
        build_along(
            Path(f"{caches[name]}.jsonl"), tiny_model, tmp_path / name, keep="sampled", top_k=draws
        )
        for name, draws in (("cache", 4), ("eval_cache", 64))
    )
    drawn = watched("drawn", cache=few, eval_cache=many)
    whole = watched("whole", eval_cache=many)
    assert drawn.evaluations[0] == whole.evaluations[0]


def test_what_does_not_go_together_is_refused(
    watched, caches, make_model, build_tiny_cache, tmp_path
):
    for settings, message in (
        ({"eval_forget": ("f",)}, "eval_forget is .* beside eval_cache .* give one of them"),
        ({"eval_retain_drop": 5.0}, "eval_retain_drop is 5.0 beside eval_cache"),
        ({"eval_max_new_tokens": 8}, "eval_max_new_tokens is 8 beside eval_cache"),
        ({"eval_steps": 0}, "eval_cache is .* without eval_steps; give eval_steps too"),
        ({"eval_cache": None}, "eval_forget is empty, .* goes with eval_cache"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            watched(**settings)
    with pytest.raises(ConfigurationError, match="eval_cache is .* gradient-difference takes none"):
        RunConfig(
            student="s",
            out="o",
            objective="gradient-difference",
            forget=("f",),
            retain=("r",),
            eval_cache="c",
            eval_steps=1,
        )
    other = make_model(tmp_path / "wide", vocab_size=300)
    foreign = build_tiny_cache(tmp_path / "foreign", teacher=str(other))
    with pytest.raises(MismatchError, match="its tokens are not those of cache"):
        watched(eval_cache=str(foreign))


def course(*losses: float) -> list[HeldOutLoss]:
    return [HeldOutLoss(step=i, loss=loss, cross_entropy=0.0) for i, loss in enumerate(losses)]


def test_the_lowest_loss_and_the_wait_for_a_lower_one():
    assert LowestLoss().choose(course(1, 5, 4, 4, 6)).step == 2
    assert not LowestLoss().may_stop(course(1, 2, 3, 4, 5))
    for losses, stop in (
        ((), False),
        ((9,), False),
        ((9, 5, 6), False),
        ((9, 5, 6, 5), True),
        ((9, 5, 6, 4, 6), False),
        ((9, 5, 6, 4, 6, 7), True),
    ):
        assert LowestLoss(patience=2).may_stop(course(*losses)) is stop
