import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.errors import DuetGroup
from duet_unlearn.cli.run import run_command
from duet_unlearn.distill.config import RunConfig


def invoke(*arguments: str) -> Result:
    group = DuetGroup(name="duet-distill", commands=[run_command])
    return CliRunner().invoke(group, ["run", *arguments])


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from duet_unlearn.teacher_cache.build import build
    from duet_unlearn.teacher_cache.build_config import BuildConfig

    folder = tmp_path_factory.mktemp("cli-run")
    for split in ("forget", "retain"):
        rows = [{"query": f"Who keeps {split} {i}?"} for i in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    config = BuildConfig(
        teacher=str(tiny_model),
        out=folder / "cache",
        forget=(str(folder / "forget.jsonl"),),
        retain=(str(folder / "retain.jsonl"),),
        prefix="Forget it.",
        top_k=10,
        engine="transformers",
    )
    build(config)
    return config.out


def test_every_setting_has_a_flag_with_help():
    flags = {option.name: option for option in run_command.params}
    assert set(RunConfig.__dataclass_fields__) <= flags.keys()
    for name, option in flags.items():
        if name != "cache":
            assert option.help, name
    defaults = {name: field.default for name, field in RunConfig.__dataclass_fields__.items()}
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
    assert (done.exit_code, done.stderr) == (
        1,
        "error: learning_rate is -1.0, expected a number, above 0\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_exit_code_2(cache, tiny_model, tmp_path):
    done = invoke(str(cache), "--student", str(tiny_model))
    assert done.exit_code == 2
    done = invoke(
        str(cache), "--student", "m", "--out", str(tmp_path / "s"), "--learning-rate", "quick"
    )
    assert done.exit_code == 2
    assert "'quick' is not a number or 'auto'" in done.stderr
