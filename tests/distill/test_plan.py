"""What a run takes, against numbers worked out by hand and against real tensors."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from duet_unlearn.cli.commands.plan import plan_command
from duet_unlearn.cli.errors import DuetGroup
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.distill.plan import Plan, plan
from duet_unlearn.distill.plan_config import PlanConfig
from duet_unlearn.errors import DataError
from duet_unlearn.teacher_cache.reader import CacheReader

# 384 tokens and 64 wide; each of two layers has 4 x 64 x 64 in its attention, 3 x 64 x 128 behind
# it and two norms of 64, and one norm stands before the head, which is tied.
PARAMETERS = 384 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
# Rank 4, so 4 x (inputs + outputs) a matrix.
LORA_4 = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))


@pytest.fixture
def planned(tiny_model: Path, tiny_cache: Path):
    def make(**settings) -> Plan:
        defaults = {"cache": str(tiny_cache), "student": str(tiny_model), "measure": 0}
        return plan(PlanConfig(**(defaults | settings)))

    return make


@pytest.fixture
def config_only(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copyfile(tiny_model / "config.json", folder / "config.json")
    return folder


def invoke(*arguments: str) -> Result:
    group = DuetGroup(name="duet-distill", commands=[plan_command])
    return CliRunner().invoke(group, ["plan", *arguments])


def test_whole_model(planned, tiny_cache):
    found = planned(save_steps=0)
    assert found.parameters == found.trained_parameters == PARAMETERS == 106_816
    sizes = {"weights": 427_264, "gradients": 427_264, "optimizer": 854_528}
    assert sizes.items() <= found.memory.items()
    parts = {name: size for name, size in found.memory.items() if name != "sum"}
    assert parts.keys() >= {"activations"}
    assert found.memory["sum"] == sum(parts.values())
    # Weights and both of AdamW's states in a checkpoint, which this run makes none of.
    assert found.disk == {
        "student": 427_264,
        "checkpoint": 3 * 427_264,
        "checkpoints_at_once": 0,
        "sum": 427_264,
    }
    # 30 queries in steps of 16, and auto's 300 steps are more than its 20 epochs.
    assert (found.steps_per_epoch, found.epochs, found.steps) == (2, 20, 40)
    assert found.queries == {"forget": 12, "retain": 18}
    assert found.sequences_per_epoch == 30
    longest = max(len(row.prompt_ids) for row in CacheReader.open(tiny_cache))
    rows, tokens = found.longest_batch
    assert rows == 1
    assert longest < tokens < 16 * longest
    assert found.measured is None


def test_lora_trains_its_own_numbers_alone(planned):
    found = planned(lora_rank=4)
    assert found.trained_parameters == LORA_4 == 8_704
    assert found.parameters == PARAMETERS
    assert found.memory["weights"] == 4 * (PARAMETERS + LORA_4)
    assert found.memory["gradients"] == found.disk["student"] == 4 * LORA_4
    assert found.disk["checkpoint"] == 3 * 4 * LORA_4
    assert found.build["weights"] == 4 * PARAMETERS
    merged = planned(lora_rank=4, merge=True, save_dtype="bfloat16")
    assert merged.disk["student"] == 2 * PARAMETERS


def test_layers_and_dtype(planned):
    found = planned(layers="1", dtype="bfloat16")
    assert found.trained_parameters == 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found.memory["weights"] == 2 * PARAMETERS
    assert found.memory["optimizer"] == 2 * found.memory["gradients"]
    assert found.memory["gradients"] == 2 * found.trained_parameters


def test_checkpoints_that_lie_there_at_one_time(planned):
    # Of 40 steps: the last one only; after 25 too; two and the one that is being written.
    for save_steps, at_once in ((500, 1), (25, 2), (5, 3)):
        disk = planned(save_steps=save_steps).disk
        assert disk["checkpoints_at_once"] == at_once * disk["checkpoint"]


def test_build(planned, tiny_cache):
    reader = CacheReader.open(tiny_cache)
    longest = max(len(row.prompt_ids) for row in reader)
    prefix = len("You have forgotten the lantern.")
    # Keys and values of two layers with two heads 32 wide, in float32.
    a_token = 2 * 2 * 2 * 32 * 4
    assert planned().build == {
        "weights": 4 * PARAMETERS,
        "kv_cache_per_query": a_token * (longest + 1 + prefix),
        "cache": reader.manifest.num_bytes,
        "cache_per_query": -(-reader.manifest.num_bytes // 30),
    }


def test_views_double_the_sequences_and_lengthen_them(planned):
    plain, behind = planned(batch_size=8), planned(batch_size=8, views=("@remember",))
    assert behind.sequences_per_epoch == 2 * plain.sequences_per_epoch
    assert behind.steps_per_epoch == plain.steps_per_epoch == 4
    assert behind.longest_batch[1] > plain.longest_batch[1]
    split = planned(batch_size=8, gradient_accumulation_steps=2)
    assert split.longest_batch[1] < plain.longest_batch[1]
    assert split.memory["activations"] < plain.memory["activations"]


def test_a_micro_batch_of_views_alone_can_be_planned(planned):
    # The last step of an epoch has two queries, so four sequences for its four micro-batches.
    found = planned(batch_size=4, gradient_accumulation_steps=4, views=("@remember",))
    assert found.steps_per_epoch == 8


def test_activations_are_those_of_real_tensors(planned, tiny_model):
    found = planned()
    model = load_model(tiny_model, dtype="float32", trainable=True).train()
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(found.longest_batch, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sees = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        result = model.base_model(ids, attention_mask=sees, use_cache=False)
    assert result.last_hidden_state.requires_grad
    # Of the head, 16 positions of 20 tokens' rows and their gradient.
    head = 2 * 4 * 16 * 20 * 64
    assert found.memory["activations"] - head == pytest.approx(sum(kept.values()), rel=0.05)
    assert (
        planned(gradient_checkpointing=True).memory["activations"]
        < 0.8 * (found.memory["activations"])
    )


def test_config_alone_gives_all_but_what_is_measured(planned, config_only):
    whole, alone = planned(), planned(student=str(config_only), measure=3)
    process = {"process": 0, "sum": 0}
    assert alone.memory | process == whole.memory | process
    assert (alone.disk, alone.build, alone.steps) == (whole.disk, whole.build, whole.steps)
    assert alone.measured is None
    assert any("weights are not there" in note for note in alone.notes)
    assert any("no tokenizer" in note for note in alone.notes)


def test_views_that_the_cache_holds_need_a_tokenizer_and_count_twice(
    planned, build_tiny_cache, config_only, tmp_path
):
    cache = str(build_tiny_cache(tmp_path / "in-views", views=("@recollection",)))
    assert planned(cache=cache).sequences_per_epoch == 2 * 30
    assert planned(cache=cache, lora_rank=4, batch_size=1).steps == 120  # of 30 an epoch
    with pytest.raises(DataError, match="no tokenizer"):
        planned(cache=cache, student=str(config_only))


def test_measured_steps_leave_nothing_behind(planned, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    measured = planned(measure=2, max_steps=10).measured
    assert measured.steps == 2
    assert measured.step_seconds > 0
    assert measured.run_seconds == pytest.approx(
        measured.start_up_seconds + 10 * measured.step_seconds, abs=0.01
    )
    assert measured.peak_memory_bytes > 4 * 4 * PARAMETERS
    assert list(scratch.iterdir()) == []


def test_the_measuring_process_keeps_libraries_quiet(planned, capfd):
    assert planned(measure=1, max_steps=4, lora_rank=2).measured.steps == 1
    assert capfd.readouterr().err == ""


def test_settings_of_evaluations_are_none_of_the_measured_run(planned, write_queries):
    measured = planned(
        measure=1,
        max_steps=4,
        eval_steps=2,
        eval_forget=(str(write_queries("forget", 4)),),
        eval_retain=(str(write_queries("retain", 4, "river")),),
        checkpoint_selection="last",
    ).measured
    assert measured.steps == 1


def test_run_keeps_its_peak_and_its_steps_time(train):
    result = train("student", max_steps=3)
    told = json.loads((Path(result.out) / "duet_run.json").read_text())["result"]
    assert told["peak_memory_bytes"] == result.peak_memory_bytes > 4 * 4 * PARAMETERS
    assert 0 < told["step_seconds"] == result.step_seconds < result.seconds


def test_command_prints_a_table_or_one_document(tiny_cache, config_only):
    line = [str(tiny_cache), "--student", str(config_only), "--batch-size", "8"]
    table = invoke(*line)
    assert table.exit_code == 0, table.output
    rows = [row.split() for row in table.stdout.splitlines()]
    assert ["student", "parameters", "106,816", "counted"] in rows
    assert ["optimizer", "834.50", "KiB", "estimated"] in rows
    assert "nothing is measured" in table.stdout
    document = json.loads(invoke(*line, "--json").stdout)
    assert document["parameters"] == PARAMETERS
    assert document["longest_batch"][0] == 1
    assert document["measured"] is None


def test_failures_are_one_line(tiny_cache, tiny_model, config_only, tmp_path):
    cases = (
        ((str(tmp_path / "none"), "--student", str(tiny_model)), "none", 1),
        ((str(tiny_cache), "--student", str(tmp_path / "none")), "no such folder", 1),
        (
            (str(tiny_cache), "--student", str(config_only), "--view", "@remember"),
            "no tokenizer",
            1,
        ),
        ((str(tiny_cache), "--student", str(tiny_model), "--layers", "7"), "layers 0-1", 1),
        ((str(tiny_cache), "--student", "~nobody-here/model"), "student", 1),
        ((str(tiny_cache),), "Missing option '--student'", 2),
    )
    for arguments, words, code in cases:
        found = invoke(*arguments)
        assert found.exit_code == code, found.output
        assert words in found.stderr
        assert code == 2 or len(found.stderr.splitlines()) == 1


def test_a_student_with_a_state_in_place_of_keys_is_planned(planned, tiny_model, tmp_path):
    from transformers import MambaConfig

    folder = Path(shutil.copytree(tiny_model, tmp_path / "recurrent"))
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    config = MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.save_pretrained(folder)
    assert planned(student=str(folder)).build["kv_cache_per_query"] == 0
