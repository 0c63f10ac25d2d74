import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.commands.run import run_command
from duet_unlearn.cli.errors import DuetGroup
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.settings import fields


def invoke(*arguments: str) -> Result:
    group = DuetGroup(name="duet-distill", commands=[run_command])
    return CliRunner().invoke(group, ["run", *arguments])


@pytest.fixture(scope="module")
def cache(build_tiny_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_cache(tmp_path_factory.mktemp("cli-run"), forget=4, retain=4)


def test_every_setting_has_a_flag_with_help():
    flags = {option.name: option for option in run_command.params}
    assert len(flags) == len(run_command.params)
    assert set(RunConfig.__dataclass_fields__) <= flags.keys()
    for name, option in flags.items():
        if name != "cache":
            assert option.help, name
    defaults = {name: field.default for name, field in fields(RunConfig).items()}
    for name in ("learning_rate", "epochs", "batch_size", "delta", "precision", "save_steps"):
        assert flags[name].default == defaults[name]


def test_json_is_one_document_and_a_second_run_is_a_hit(cache, tiny_model, tmp_path):
    arguments = [str(cache), "--student", str(tiny_model), "--out", str(tmp_path / "student")]
    done = invoke(*arguments, "--max-steps", "2", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["steps"] == 2
    assert document["queries"] == {"forget": 4, "retain": 4}
    assert document["learning_rate"] == pytest.approx(0.0512 / 64)
    again = invoke(*arguments, "--max-steps", "2")
    assert again.stdout.splitlines()[0].endswith(
        "already there, trained by this very configuration"
    )


def test_a_run_is_one_file_and_flags_win_over_it(cache, tiny_model, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"cache: {cache}\nstudent: {tiny_model}\nout: {tmp_path / 'student'}\n"
        "max_steps: 1\nlearning_rate: 1e-4\ngradient_checkpointing: yes\n"
    )
    done = invoke("--config", str(file), "--max-steps", "2", "--no-gradient-checkpointing")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "student" / "duet_run.json").read_text())["config"]
    assert (told["max_steps"], told["learning_rate"]) == (2, 1e-4)
    assert told["gradient_checkpointing"] is False
    # A flag that repeats the default still wins over the file.
    done = invoke("--config", str(file), "--learning-rate", "auto", "--json", "--overwrite")
    assert json.loads(done.stdout)["learning_rate"] == pytest.approx(0.0512 / 64)


def test_the_file_beside_a_student_makes_the_same_student(cache, tiny_model, tmp_path):
    arguments = [str(cache), "--student", str(tiny_model), "--out", str(tmp_path / "student")]
    done = invoke(*arguments, "--max-steps", "3", "--view", "@remember", "--seed", "5")
    assert done.exit_code == 0, done.output
    file = tmp_path / "student" / "duet_run.yaml"
    # The file tells no folder of this machine, so what lay elsewhere is named anew.
    there = [str(cache), "--student", str(tiny_model)]
    again = invoke(*there, "--config", str(file), "--out", str(tmp_path / "again"))
    assert again.exit_code == 0, again.output
    one, other = tmp_path / "student", tmp_path / "again"
    name = "model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    assert (one / name).read_bytes() != (tiny_model / name).read_bytes()
    # The same configuration in the same place: there is nothing to do.
    again = invoke(*there, "--config", str(file), "--out", str(tmp_path / "student"))
    assert "already there" in again.stdout


def test_the_file_beside_a_student_pins_its_cache(cache, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = shutil.copytree(cache, tmp_path / "cache")
    shutil.copytree(tiny_model, tmp_path / "tiny")
    invoke(str(mine), "--student", "tiny", "--out", "s", "--max-steps", "1")
    manifest = json.loads((mine / "manifest.json").read_text())
    file = tmp_path / "s" / "duet_run.yaml"
    assert f"cache: cache@{manifest['digest']}\n" in file.read_text()
    file.write_text(file.read_text().replace(manifest["digest"], "sha256:" + "0" * 64))
    done = invoke("--config", str(file), "--out", str(tmp_path / "t"))
    assert done.exit_code == 1
    assert "sha256:0000" in done.stderr


def test_the_help_page_lists_every_option_once_under_a_heading():
    page = invoke("--help").stdout
    assert page.index("Where from, where to:") < page.index("Optimization:")
    for option in run_command.params:
        if option.name != "cache":
            assert len(re.findall(rf"^  {option.opts[0]}(?![\w-])", page, re.MULTILINE)) == 1, (
                option.name
            )


def test_a_failure_is_one_line_and_leaves_nothing(cache, tiny_model, tmp_path):
    out = tmp_path / "student"
    done = invoke(str(cache), "--student", str(tmp_path / "none"), "--out", str(out))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    done = invoke(
        str(cache), "--student", str(tiny_model), "--out", str(out), "--learning-rate", "-1"
    )
    assert done.exit_code == 2
    assert "'-1', expected a number, above 0, or auto" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_exit_code_2(cache, tiny_model, tmp_path):
    done = invoke(str(cache), "--student", str(tiny_model))
    assert done.exit_code == 2
    assert "Missing option '--out'; give it, or write `out:` into the file" in done.stderr
    done = invoke("--student", str(tiny_model), "--out", str(tmp_path / "s"))
    assert done.exit_code == 2
    assert "Missing argument 'CACHE'" in done.stderr
    done = invoke(
        str(cache), "--student", "m", "--out", str(tmp_path / "s"), "--learning-rate", "quick"
    )
    assert done.exit_code == 2
    assert "'quick', expected a number, above 0, or auto" in done.stderr


@pytest.mark.parametrize(
    ("theirs", "ours"), [("lr", "learning-rate"), ("num-train-epochs", "epochs")]
)
def test_what_other_tools_call_a_setting_gets_its_name_here(
    cache: Path, tmp_path: Path, theirs: str, ours: str
) -> None:
    line = (str(cache), "--student", "m", "--out", str(tmp_path / "s"))
    done = invoke(*line, f"--{theirs}", "1")
    assert (done.exit_code, f"--{ours}" in done.stderr) == (2, True)
    file = tmp_path / "run.yaml"
    file.write_text(f"{theirs.replace('-', '_')}: 1\n")
    done = invoke(*line, "--config", str(file))
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"did you mean {ours.replace('-', '_')}?" in done.stderr
