"""What goes wrong on the way: folders of others, torn checkpoints, full memory and disks."""

import json
import logging
import math
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from duet_unlearn.distill.output.run_folder import RunFolder, files_of, foreign_file
from duet_unlearn.distill.training.trainer import DuetTrainer
from duet_unlearn.errors import ConfigurationError, DataError, OutputError


def weights_of(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_overwrite_removes_a_folder_only_if_its_record_names_every_file(train, tmp_path):
    out = Path(train(epochs=1).out)
    assert foreign_file(out) is None
    told = json.loads((out / "duet_run.json").read_text())
    assert told["files"] == files_of(out)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match=r"no student of ours \(notes/mine.txt\)"):
        train(epochs=2, overwrite=True)
    shutil.rmtree(out / "notes")
    (out / "notes").mkdir()
    with pytest.raises(ConfigurationError, match=r"no student of ours \(notes\)"):
        train(epochs=2, overwrite=True)
    (out / "notes").rmdir()
    train(epochs=2, overwrite=True)


@pytest.mark.parametrize("record", ["{}", "[]", "{", '{"files": ["thesis.tex"]}'])
def test_a_run_file_alone_proves_nothing(train, tmp_path, record):
    thesis = tmp_path / "student"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    (thesis / "duet_run.json").write_text(record)
    with pytest.raises(ConfigurationError, match="holds files that are no student of ours"):
        train(overwrite=True)
    assert (thesis / "thesis.tex").read_text() == "years of work"


def test_what_appears_at_out_during_a_run_is_kept(train, stop_at_pass, tmp_path):
    def appear() -> None:
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "results").write_text("mine")

    with stop_at_pass(2, appear), pytest.raises(OutputError, match="appeared there while training"):
        train(save_steps=4)
    assert (tmp_path / "student" / "results").read_text() == "mine"
    (tmp_path / "student").rename(tmp_path / "elsewhere")
    done = train(save_steps=4)
    assert done.steps == 12
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_places_that_no_student_can_have_are_refused_before_training(
    train, tiny_cache, monkeypatch, tmp_path
):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("/", str(tmp_path / "loop")):
        with pytest.raises(ConfigurationError, match="where no folder can be"):
            train(out=place)
    with pytest.raises(ConfigurationError, match="lies inside the cache"):
        train(out=str(tiny_cache / "shards" / "student"))
    with pytest.raises(ConfigurationError, match="there is no user 'nobodyhere'"):
        train(out="~nobodyhere/x")
    with pytest.raises(ConfigurationError, match="student is '~nobodyhere/x', but there is no use"):
        train(student="~nobodyhere/x")
    with pytest.raises(ConfigurationError, match="out is empty"):
        train(out="")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "student")
    with pytest.raises(ConfigurationError, match="is a mount point"):
        train()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(train, stop_at_pass, tmp_path, caplog):
    undisturbed = train("undisturbed", save_steps=3)

    def die() -> None:
        raise OSError("the machine is gone")

    for name, file in (("weights", "model.safetensors"), ("optimizer", "optimizer.pt")):
        with stop_at_pass(8, die), pytest.raises(OSError, match="gone"):
            train(name, save_steps=3)
        work = tmp_path / f"{name}.unfinished"
        assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
        (work / "checkpoint-6" / file).write_bytes(b"torn")
        with caplog.at_level(logging.WARNING):
            again = train(name, save_steps=3)
        assert "checkpoint-6: cannot be read" in caplog.text
        assert weights_of(again.out) == weights_of(undisturbed.out)


def test_what_fails_before_a_step_costs_no_checkpoint(train, stop_at_pass, tmp_path, monkeypatch):
    def die() -> None:
        raise OSError("the machine is gone")

    with stop_at_pass(8, die), pytest.raises(OSError, match="gone"):
        train(save_steps=3)

    def no_tracker(*_: object, **__: object) -> None:
        raise ImportError("no login")

    with monkeypatch.context() as patch:
        patch.setattr(DuetTrainer, "create_optimizer", no_tracker)
        with pytest.raises(ImportError, match="no login"):
            train(save_steps=3)
    kept = {path.name for path in (tmp_path / "student.unfinished").glob("*checkpoint-*")}
    assert kept == {"checkpoint-3", "checkpoint-6"}
    train(save_steps=3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_full_memory_is_one_line_with_what_to_do(train, stop_at_pass, error):
    def fill() -> None:
        raise error

    with stop_at_pass(2, fill), pytest.raises(ConfigurationError) as caught:
        train()
    assert str(caught.value).startswith("out of memory at step 2 with 8 queries in 1 micro-batch")
    assert "--gradient-accumulation-steps" in str(caught.value)


def test_a_disk_that_is_full_while_saving_is_one_line(train, tmp_path):
    # A limit on file sizes fails as a full disk does, at the first checkpoint.
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, previous[1]))
        with pytest.raises(OutputError, match=r"student\.unfinished.*cannot write") as caught:
            train(save_steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "student").exists()
    train(save_steps=4)


def test_a_view_too_long_for_the_student_is_refused_before_training(train, tmp_path):
    view = tmp_path / "views.txt"
    view.write_text("Please " * 200 + "{query}\n")
    with pytest.raises(
        DataError, match=r"view views:1: query .* tokens behind it, but the student"
    ):
        train(views=(str(view),))
    assert not (tmp_path / "student.unfinished").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_training(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match="report_to is 'wandb', but wandb is not installed"
    ):
        train(report_to="wandb")


def test_arguments_pass_through_to_the_trainer(train, monkeypatch):
    seen = []
    plain = DuetTrainer.create_optimizer

    def create_optimizer(self, *args, **kwargs):
        seen.append((self.args.adam_beta2, self.args.optim))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DuetTrainer, "create_optimizer", create_optimizer)
    train(trainer_args={"adam_beta2": 0.9, "optim": "adafactor"}, epochs=1)
    assert seen == [(0.9, "adafactor")]
    with pytest.raises(ConfigurationError, match="'adam_beta3'.* did you mean adam_beta"):
        train("none", trainer_args={"adam_beta3": 0.9})
    for refused in (
        {"optim": "guesswork"},
        {"adam_beta2": 2.0},
        {"lr_scheduler_kwargs": {"x": 1}},
        {"log_level": "loud"},
        {"accelerator_config": "nosuch.json"},
    ):
        with pytest.raises(ConfigurationError, match="the Trainer refuses these settings"):
            train("none", trainer_args=refused)
    with pytest.raises(ConfigurationError, match="adam_beta2='abc': input should be a valid num"):
        train("none", trainer_args={"adam_beta2": "abc"})
    with pytest.raises(ConfigurationError, match="neftune_noise_alpha=nan: .*finite number"):
        train("none", trainer_args={"neftune_noise_alpha": math.nan})


def test_another_configuration_or_template_of_the_base_is_another_run(train, tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    train(student=str(base), epochs=1)
    assert train(student=str(base), epochs=1).hit
    config = json.loads((base / "config.json").read_text())
    template = (base / "chat_template.jinja").read_text()
    for file, changed in (
        ("config.json", json.dumps({**config, "rms_norm_eps": 1e-3})),
        ("chat_template.jinja", template + "{# another #}"),
    ):
        before = (base / file).read_text()
        (base / file).write_text(changed)
        with pytest.raises(ConfigurationError, match=r"another run \(base is "):
            train(student=str(base), epochs=1)
        (base / file).write_text(before)
        assert train(student=str(base), epochs=1).hit


def test_no_password_of_a_url_enters_the_students_files(train, tiny_cache, monkeypatch):
    from duet_unlearn.distill.objectives import duet

    plain = duet.CacheReader.open
    monkeypatch.setattr(duet.CacheReader, "open", lambda _: plain(tiny_cache))
    out = Path(train(cache="https://me:s3cr3t@host/cache?X-Amz-Signature=s3cr3t", epochs=1).out)
    assert not [path for path in out.rglob("*") if b"s3cr3t" in path.read_bytes()]
    assert "https://host/cache" in (out / "duet_run.yaml").read_text()


def test_no_path_or_password_of_a_trainer_argument_enters_the_students_files(train, tmp_path):
    path = tmp_path / "accelerator.json"
    path.write_text('{"even_batches": true}')
    passed = {"accelerator_config": str(path), "run_name": "https://me:s3cr3t@host/run"}
    out = Path(train(epochs=1, trainer_args=passed).out)
    written = {name: (out / name).read_bytes() for name in files_of(out)}
    assert not [name for name, data in written.items() if b"s3cr3t" in data]
    assert not [name for name, data in written.items() if str(tmp_path).encode() in data]
    assert train(epochs=1, trainer_args=passed).hit


def test_a_piped_run_logs_loss_rate_and_time_left(train, monkeypatch, caplog):
    monkeypatch.setattr("duet_unlearn.progress.EVERY_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        train(logging_steps=1)
    lines = [line for line in caplog.messages if line.startswith("distilling")]
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"distilling: 5 of 12 steps, {number}/s, 0:\d\d left; "
        rf"loss_forget {number}, loss_retain {number}",
        lines[4],
    )


def test_nothing_is_a_student_but_what_says_so(tmp_path):
    folder = RunFolder(out=tmp_path / "student", identity={"settings": {}, "base": {}})
    folder.work.mkdir()
    (folder.work / "identity.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="holds files that are no unfinished run"):
        folder.prepare(overwrite=True)
