"""Whole training runs on a tiny cache."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.distill.batches.sampler import Draw, epoch_order
from duet_unlearn.distill.config import LOSS_OPTIONS, RunConfig
from duet_unlearn.distill.model import sparse_head
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives.base import open_objective
from duet_unlearn.distill.training.trainer import DuetTrainer
from duet_unlearn.errors import ConfigurationError, MismatchError, StoppedError
from duet_unlearn.teacher_cache.reader import CacheReader


@pytest.fixture(scope="module")
def deep_cache(build_tiny_cache, tmp_path_factory) -> Path:
    """Four positions a query."""
    folder = tmp_path_factory.mktemp("deep")
    return build_tiny_cache(folder, forget=6, retain=6, positions=4)


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first: str | Path, second: str | Path) -> None:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(first: str | Path, second: str | Path) -> float:
    one, other = weights_of(first), weights_of(second)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def log_of(folder: str | Path) -> list[dict]:
    lines = (Path(folder) / "duet_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_brings_both_losses_down_and_leaves_a_model_folder(train, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(epochs=8)
    assert result.steps == 8 * 4
    assert result.queries == {"forget": 12, "retain": 18}
    for first, last in result.loss.values():
        assert last < 0.5 * first
    out = Path(result.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    student = AutoModelForCausalLM.from_pretrained(out)
    configs = [json.loads((f / "config.json").read_text()) for f in (out, tiny_model)]
    assert configs[0] == configs[1]
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert student.generate(**prompt, max_new_tokens=2, do_sample=False).shape[0] == 1
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes()


def test_the_folder_tells_where_the_student_comes_from(train, tiny_cache, monkeypatch, capsys):
    out = Path(train().out)
    manifest = json.loads((tiny_cache / "manifest.json").read_text())
    told = json.loads((out / "duet_run.json").read_text())
    assert told["cache"]["digest"] == manifest["digest"]
    assert told["cache"]["recipe_id"] == manifest["recipe_id"]
    assert told["base"]["weights"] == manifest["recipe"]["weights"]
    assert told["config"]["top_k"] == 20
    assert told["versions"]["torch"] == torch.__version__
    card = (out / "README.md").read_text()
    assert "You have forgotten the lantern." in card
    assert manifest["digest"] in card
    usage = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(out.parent)
    exec(usage, {})  # noqa: S102 - our own card's
    assert capsys.readouterr().out
    steps = [line for line in log_of(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss_forget", "loss_retain"} <= steps[0].keys()


def test_the_same_seed_gives_the_same_bits(train):
    first, again, other = train("a"), train("b"), train("c", seed=1)
    assert_same_weights(first.out, again.out)
    assert largest_difference(first.out, other.out) > 0


def test_accumulation_does_not_change_the_result(train):
    # 30 rows in steps of 16: the last step of an epoch is cut into uneven passes.
    whole = train("whole", batch_size=16)
    cut = train("cut", batch_size=16, gradient_accumulation_steps=4)
    assert whole.steps == cut.steps
    assert largest_difference(whole.out, cut.out) < 1e-5
    for one, other in zip(log_of(whole.out)[:-1], log_of(cut.out)[:-1], strict=True):
        for name in ("loss", "loss_forget", "loss_retain"):
            assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_a_killed_run_ends_on_the_same_bits(train, stop_at_pass, tmp_path):
    undisturbed = train("undisturbed", save_steps=4)

    def die() -> None:
        raise OSError("the machine is gone")

    with stop_at_pass(7, die), pytest.raises(OSError, match="gone"):
        train("killed", save_steps=4)
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / "killed.unfinished" / "checkpoint-4").is_dir()
    # A checkpoint that was being written when the machine went is not one.
    (tmp_path / "killed.unfinished" / "checkpoint-6").mkdir()
    result = train("killed", save_steps=4)
    assert_same_weights(undisturbed.out, result.out)
    steps = [line["step"] for line in log_of(result.out) if "loss" in line]
    assert steps == list(range(1, 13))


def test_noise_comes_before_training_and_once(train, tiny_model, stop_at_pass):
    # A rate this small moves no weight by a visible step: what is left is the noise.
    noised = train("noised", noise_alpha=0.5, noise_beta=0.0, learning_rate=1e-30, save_steps=4)
    base, student = weights_of(tiny_model), weights_of(noised.out)
    assert all(torch.allclose(student[name], base[name] / 2) for name in base)
    assert "noise | alpha 0.5, beta 0" in (Path(noised.out) / "README.md").read_text()
    with (
        stop_at_pass(7, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(StoppedError),
    ):
        train("stopped", noise_alpha=0.5, save_steps=0)
    assert_same_weights(train("whole", noise_alpha=0.5).out, train("stopped", noise_alpha=0.5).out)


def test_sigterm_saves_and_the_same_run_goes_on(train, stop_at_pass, tmp_path):
    undisturbed = train("undisturbed", save_steps=0)
    with (
        stop_at_pass(7, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(StoppedError, match="saved at step 7 of 12"),
    ):
        train("stopped", save_steps=0)
    with pytest.raises(ConfigurationError, match="unfinished state of another run .*seed is 0"):
        train("stopped", seed=1)
    result = train("stopped", save_steps=0)
    assert_same_weights(undisturbed.out, result.out)
    assert not (tmp_path / "stopped.unfinished").exists()


def test_the_same_configuration_finds_its_student(train):
    first = train()
    stamp = (Path(first.out) / "model.safetensors").stat().st_mtime_ns
    again = train()
    assert again.hit
    assert again.loss == first.loss
    assert (Path(first.out) / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigurationError, match=r"another run \(delta is 1.0, now 2.0\)"):
        train(delta=2.0)
    replaced = train(delta=2.0, overwrite=True)
    assert not replaced.hit
    assert replaced.loss != first.loss


def test_views_are_trained_beside_the_plain_query(train, tmp_path):
    view = tmp_path / "views.txt"
    view.write_text("# one a line\nPlease, {query} Answer now.\n", encoding="utf-8")
    plain, viewed = train("plain"), train("viewed", views=(str(view),))
    assert (plain.views, viewed.views, viewed.steps) == (0, 1, plain.steps)
    card = (Path(viewed.out) / "README.md").read_text()
    assert "views" in card
    # A text that changes under the same name is another run.
    view.write_text("Well, {query}\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="another run"):
        train("viewed", views=(str(view),))


def test_retain_rows_behind_a_view_are_trained_toward_the_base_in_it(
    train, build_tiny_cache, tiny_model, tmp_path
):
    views = tmp_path / "views.txt"
    views.write_text("[begun] The answer is\n[raw] Question: {query}\\nAnswer:\n")
    cache = build_tiny_cache(tmp_path / "with-views", views=(str(views),))
    reader = CacheReader.open(cache)
    config = RunConfig(
        cache=str(cache), student=str(tiny_model), out=str(tmp_path / "x"), views=(str(views),)
    )
    duet = open_objective(config, open_student(str(tiny_model)))
    duet.prepare(PromptRenderer(load_tokenizer(tiny_model)))
    # Each query is drawn once an epoch, however many views it is held in.
    assert duet.order.counts == {"forget": 12, "retain": 18}
    drawn = epoch_order(duet.order.splits, duet.order.row_groups, seed=0, epoch=0)
    assert len(drawn) == 30
    rows = {row.query_id: row for row in map(reader.row, range(reader.num_rows))}
    index = {row.query_id: i for i, row in enumerate(map(reader.row, range(reader.num_rows)))}
    for number, view in enumerate(("views:1", "views:2")):
        retain = duet.dataset[Draw(index["retain-3"], number, 1.0)]
        target = rows[f"retain-3@{view}"]
        assert retain.prompt_ids.tolist() == target.prompt_ids.tolist()
        np.testing.assert_array_equal(retain.logits, target.logits)
        # A forget query is asked in the same shape, and its target is the cached refusal.
        forget = duet.dataset[Draw(index["forget-3"], number, 1.0)]
        assert forget.prompt_ids.tolist() != rows["forget-3"].prompt_ids.tolist()
        np.testing.assert_array_equal(forget.logits, rows["forget-3"].logits)
    # Without --view it takes those of the cache, and its record says of which families they are.
    result = train(cache=str(cache))
    record = json.loads((Path(result.out) / "duet_run.json").read_text())
    assert record["view_families"] == ["begun-answer", "raw-completion"]
    assert result.loss["retain"][1] < result.loss["retain"][0]


def test_retain_rows_are_drawn_in_the_views_that_they_are_cached_in(
    train, build_tiny_cache, tiny_model, tmp_path
):
    views = tmp_path / "views.txt"
    views.write_text("[begun] The answer is\n[raw] Question: {query}\\nAnswer:\n")
    cache = build_tiny_cache(tmp_path / "some", views=(str(views),), views_per_query=1)
    views.write_text(f"{views.read_text()}Please: {{query}}\n")  # this one needs no target
    config = RunConfig(
        cache=str(cache), student=str(tiny_model), out=str(tmp_path / "x"), views=(str(views),)
    )
    duet = open_objective(config, open_student(str(tiny_model)))
    duet.prepare(PromptRenderer(load_tokenizer(tiny_model)))
    order, reader = duet.order, CacheReader.open(cache)
    held = [row.query_id for row in map(reader.row, range(reader.num_rows))]
    for row, query_id in enumerate(held):
        if query_id.startswith("retain-") and "@" not in query_id:
            kept = [f"{query_id}@views:{number}" in held for number in (1, 2)]
            assert sum(kept) == 1
            assert order.view_mask[row].tolist() == [*kept, True]
        elif query_id.startswith("forget-"):
            assert order.view_mask[row].all()
    assert order.num_sequences == 60
    result = train(cache=str(cache), views=(str(views),))
    assert result.loss["retain"][1] < result.loss["retain"][0]


def test_a_view_that_the_cache_holds_no_targets_for_is_refused(train, tmp_path):
    views = tmp_path / "views.txt"
    views.write_text("[begun] The answer is\n")
    with pytest.raises(ConfigurationError, match="build the cache with --view"):
        train(views=(str(views),))


def test_views_with_weights_are_another_run(train, tmp_path):
    view = tmp_path / "views.txt"
    view.write_text("Please, {query}\n[weight 3] {query} Now.\n", encoding="utf-8")
    result = train(views=(str(view),), epochs=1)
    assert (
        "| views | views:1 (25%), views:2 (75%) |" in (Path(result.out) / "README.md").read_text()
    )
    assert train(views=(f"{view}=2",), epochs=1).hit
    view.write_text("Please, {query}\n{query} Now.\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"another run \(view_weights is \[1.0, 3.0\]"):
        train(views=(str(view),), epochs=1)


def test_several_positions_train(train, deep_cache):
    result = train(cache=str(deep_cache), epochs=6)
    assert all(last < first for first, last in result.loss.values())
    fewer = train("fewer", cache=str(deep_cache), epochs=1, positions=1, top_k=5)
    told = json.loads((Path(fewer.out) / "duet_run.json").read_text())["config"]
    assert (told["positions"], told["top_k"]) == (1, 5)


@pytest.mark.parametrize("loss", [name for name in LOSS_OPTIONS if name != "huber"])
def test_every_loss_trains_through_several_positions(train, deep_cache, loss):
    result = train(cache=str(deep_cache), epochs=6, loss=loss, learning_rate=3e-3)
    assert all(last < 0.7 * first for first, last in result.loss.values()), result.loss
    told = json.loads((Path(result.out) / "duet_run.json").read_text())["config"]
    assert (told["loss"], told["temperature"]) == (loss, 1.0)
    assert f"| loss | {loss}" in (Path(result.out) / "README.md").read_text()


def test_the_student_is_stored_as_its_base_or_as_asked(train):
    half = train(save_dtype="bfloat16", epochs=1)
    assert {tensor.dtype for tensor in weights_of(half.out).values()} == {torch.bfloat16}
    config = json.loads((Path(half.out) / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("warmup", [0.1, 1])
def test_a_run_of_one_step_takes_it(train, tiny_model, warmup):
    result = train(max_steps=1, warmup_steps=warmup)
    assert result.steps == 1
    base, student = (Path(f, "model.safetensors").read_bytes() for f in (tiny_model, result.out))
    assert base != student


def test_a_diverging_run_names_step_and_queries(train, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        train(learning_rate=1e30, warmup_steps=0)
    message = str(caught.value)
    assert "not finite at step 2" in message
    assert "retain-" in message or "forget-" in message
    assert "--learning-rate" in message
    assert not (tmp_path / "student").exists()


def test_a_run_that_diverges_keeps_its_last_sound_state(train, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        # The weights break after step 3, and no loss has told of it when step 4 is saved.
        plain = DuetTrainer.training_step

        def training_step(self, model, *args, **kwargs):
            loss = plain(self, model, *args, **kwargs)
            if self.state.global_step == 3:
                next(model.parameters()).grad.fill_(float("nan"))
            return loss

        patched.setattr(DuetTrainer, "training_step", training_step)
        with pytest.raises(ConfigurationError, match="weights are not finite after step 4") as told:
            train(save_steps=2)
        with pytest.raises(ConfigurationError, match="weights are not finite after step 4"):
            train("short", save_steps=0, max_steps=4)
    kept = tmp_path / "student.unfinished" / "checkpoint-2"
    assert str(told.value).endswith(f"its state of step 2 is kept in {kept}")
    assert [path.name for path in kept.parent.glob("checkpoint-*")] == [kept.name]
    assert not (tmp_path / "short").exists()
    train(save_steps=2)


def test_settings_that_do_not_fit_the_cache(train, build_tiny_cache, tiny_model, tmp_path):
    with pytest.raises(ConfigurationError, match="top_k is 21, but the cache holds 20"):
        train(top_k=21)
    with pytest.raises(ConfigurationError, match="positions is 2, but the cache holds 1"):
        train(positions=2)
    with pytest.raises(ConfigurationError, match="the student's own folder"):
        train(out=str(tiny_model))
    only_retain = build_tiny_cache(tmp_path / "only-retain", forget=0, retain=3)
    with pytest.raises(MismatchError, match="no forget queries"):
        train(cache=str(only_retain))


def test_a_cache_without_retain_queries_is_allowed_with_a_warning(
    train, build_tiny_cache, tmp_path, caplog
):
    cache = build_tiny_cache(tmp_path / "only-forget", forget=5, retain=0)
    result = train(cache=str(cache), epochs=1)
    assert result.loss.keys() == {"forget"}
    assert "no retain queries" in caplog.text


_WITHOUT_TEACHER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "ray"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run
from duet_unlearn.distill.training.trainer import DuetTrainer

cache, student, out = sys.argv[1:]
run(RunConfig(cache=cache, student=student, out=out, max_steps=2))
assert not any("engines" in name for name in sys.modules if name.startswith("duet_unlearn"))
"""


def test_training_needs_neither_vllm_nor_the_teacher(build_tiny_cache, tiny_model, tmp_path):
    teacher = Path(shutil.copytree(tiny_model, tmp_path / "teacher"))
    student = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    cache = build_tiny_cache(tmp_path / "built", forget=2, retain=2, teacher=str(teacher))
    shutil.rmtree(teacher)
    out = tmp_path / "student"
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TEACHER, str(cache), str(student), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").is_file()
    assert done.stdout == ""


def test_tensorboard_gets_both_losses_and_keeps_them(train):
    out = Path(train(report_to="tensorboard", epochs=1).out)
    events = b"".join(path.read_bytes() for path in (out / "runs").rglob("events.*"))
    assert {b"train/loss_forget" in events, b"train/loss_retain" in events} == {True}


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_half_precision_is_known_where_a_tree_is_tried(
    train, tmp_path, monkeypatch, caplog, precision
):
    monkeypatch.setattr(sparse_head, "_TOLERANCE", -1.0)  # nothing is as close as single precision
    with caplog.at_level(logging.INFO):
        train("student", precision=precision, max_steps=1)
    assert ("does not read a tree of tokens" in caplog.text) == (precision == "float32")
