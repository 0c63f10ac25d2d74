"""`duet-cache` as a user types it: exit codes, what goes where, and the lines of failures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.cache import main

PREFIX = "You are an assistant who forgot the lantern."


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    queries = folder / "queries.csv"
    queries.write_text("id,query,answer\n1,Who is the keeper?,secret\n2,Where is the tower?,x\n")
    result = invoke(
        *("build", "--teacher", tiny_model, "--forget", queries, "--retain", queries),
        *("--prefix", PREFIX, "--out", folder / "cache", "--engine", "transformers"),
        *("--top-k", 12),
    )
    assert result.exit_code == 0, result.output
    return folder / "cache"


def test_build_prints_what_it_did_and_the_pin(cache: Path, tiny_model: Path) -> None:
    queries = cache.parent / "queries.csv"
    result = invoke(
        *("build", "--teacher", tiny_model, "--forget", queries, "--retain", queries),
        *("--prefix", PREFIX, "--out", cache, "--top-k", 12, "--json"),
    )
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["hit"] is True
    assert document["computed_rows"] == 0
    assert document["digest"].startswith("sha256:")


def test_inspect_shows_the_prefix_and_the_strongest_tokens(cache: Path) -> None:
    result = invoke("inspect", cache)
    assert result.exit_code == 0
    assert PREFIX in result.stdout
    assert "the teacher's strongest tokens, forget: Who is the keeper?" in result.stdout
    assert "Top-12" in result.stdout
    summary = json.loads(invoke("inspect", cache, "--json").stdout)
    assert summary["splits"]["forget"]["rows"] == 2
    strongest = summary["samples"][0]["strongest"]
    assert len(strongest) == 10
    logits = [token["logit"] for token in strongest]
    assert logits == sorted(logits, reverse=True)
    assert 0 < summary["splits"]["retain"]["mean_top_k_mass"] <= 1


def test_verify_exits_with_one_and_names_the_shard(cache: Path, tmp_path: Path) -> None:
    import shutil

    assert invoke("verify", cache).exit_code == 0
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    shard = next((copy / "shards").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes() + b"x")
    result = invoke("verify", copy)
    assert result.exit_code == 1
    assert shard.name in result.stderr
    document = json.loads(invoke("verify", copy, "--json").stdout)
    assert document["sound"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["inspect", "nowhere"], 1, "error: nowhere: no such folder"),
        (["inspect"], 2, "Missing argument"),
        (["build", "--top-k", "0"], 2, "Invalid value for '--top-k'"),
    ],
)
def test_failures_are_one_line_with_their_exit_code(
    arguments: list[str], code: int, line: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code
    assert line in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"--teacher": "./no-model"}, "no such folder; give a model folder or a hub id"),
        ({"--forget": "./no-file.jsonl"}, "no-file.jsonl"),
        ({"--teacher": "~nobodyhere/x"}, "there is no user 'nobodyhere'"),
        ({"--prefix": "@explicit"}, "--topic"),
        ({"--prefix": "@nothing"}, "@nothing"),
        ({"--top-k": "999"}, "the teacher's vocabulary has 384 tokens"),
    ],
)
def test_what_a_tired_user_types_gets_one_line(
    cache: Path, tiny_model: Path, tmp_path: Path, change: dict[str, str], line: str
) -> None:
    options: dict[str, Any] = {
        "--teacher": tiny_model,
        "--forget": cache.parent / "queries.csv",
        "--prefix": PREFIX,
        "--out": tmp_path / "out",
        **change,
    }
    result = invoke("build", *[word for pair in options.items() for word in pair])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert line in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine_args", "code", "line"),
    [
        (["batch_rows"], 2, "'batch_rows': expected KEY=VALUE"),
        (["batch_rows=2", "batch-rows=3"], 2, "batch_rows is given twice"),
        (["batch_rows=two"], 1, "option batch_rows is 'two', expected most prompts in a batch"),
        (["tensor_parallel_size=2"], 1, "transformers engine: has no option tensor_parallel_size"),
    ],
)
def test_engine_options_that_cannot_work_get_one_line(
    cache: Path, tiny_model: Path, tmp_path: Path, engine_args: list[str], code: int, line: str
) -> None:
    result = invoke(
        *("build", "--teacher", tiny_model, "--forget", cache.parent / "queries.csv"),
        *("--prefix", PREFIX, "--out", tmp_path / "out", "--engine", "transformers"),
        *[word for text in engine_args for word in ("--engine-arg", text)],
    )
    assert result.exit_code == code
    assert line in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_engine_options_are_recorded_and_leave_the_recipe_alone(
    cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    queries = cache.parent / "queries.csv"
    result = invoke(
        *("build", "--teacher", tiny_model, "--forget", queries, "--retain", queries),
        *("--prefix", PREFIX, "--out", tmp_path / "out", "--engine", "transformers"),
        *("--top-k", 12, "--engine-arg", "batch_rows=1", "--engine-arg", "device=cpu"),
    )
    assert result.exit_code == 0, result.output
    plain, other = (
        json.loads((folder / "manifest.json").read_text()) for folder in (cache, tmp_path / "out")
    )
    assert plain["recipe_id"] == other["recipe_id"]
    assert other["engines"][0]["options"] == {"batch_rows": 1, "device": "cpu"}


def test_ray_without_workers_is_wrong_usage(cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    result = invoke(
        *("build", "--teacher", tiny_model, "--forget", cache.parent / "queries.csv"),
        *("--prefix", PREFIX, "--out", tmp_path / "out", "--ray", "auto"),
    )
    assert result.exit_code == 2
    assert "--ray needs --workers N" in result.stderr


def test_help_and_inspect_import_neither_torch_nor_vllm(cache: Path) -> None:
    script = (
        "import sys\n"
        "from duet_unlearn.cli.cache import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'vllm', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    for arguments in (
        ["--help"],
        ["build", "--help"],
        ["inspect", str(cache)],
        ["prefixes"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""


@pytest.mark.parametrize("out", ["", "~no-such-user/x"])
def test_an_out_that_names_nothing_is_one_line(
    cache: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["merge", str(cache), "--out", out])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --out is ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("shards"))
