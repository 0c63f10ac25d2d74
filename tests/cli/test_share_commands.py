"""`duet-cache push`, `pull`, `list`, and URLs on the command line: text, JSON, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.cache import main
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    queries = folder / "queries.jsonl"
    queries.write_text("".join(json.dumps({"query": f"Who is {i}?"}) + "\n" for i in range(6)))
    out = folder / "cache"
    build(
        BuildConfig(
            teacher=str(tiny_model),
            forget=(str(queries),),
            retain=(),
            prefix="You have forgotten it.",
            out=out,
            engine="transformers",
            top_k=5,
            shard_rows=2,
        )
    )
    return out


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_push_list_and_pull_say_what_they_did(cache: Path, tmp_path: Path) -> None:
    digest = json.loads((cache / "manifest.json").read_text())["digest"]
    size = sum(path.stat().st_size for path in (cache / "shards").iterdir())
    there, here = tmp_path / "all" / "there", tmp_path / "here"
    sent = run("push", cache, there)
    assert sent.stdout == (
        f"{there}: 6 forget, 0 retain (3 of 3 shard(s) moved, {size} bytes), {size} bytes\n"
        f"pin it as {there}@{digest}\n"
    )
    assert "6 forget, 0 retain (found finished)" in run("push", cache, there).stdout
    listed = run("list", tmp_path / "all")
    assert listed.stdout.splitlines()[:2] == ["there", f"    {digest}"]
    assert f"6 rows, {size} bytes, Top-5, 1 position(s)" in listed.stdout
    assert '    prefix "You have forgotten it."\n' in listed.stdout
    got = json.loads(run("pull", f"{there}@{digest}", here, "--json").stdout)
    assert got == {
        "cache": str(here),
        "digest": digest,
        "hit": False,
        "rows": 6,
        "shards": 3,
        "bytes": size,
        "moved_shards": 3,
        "moved_bytes": size,
    }


def test_list_gives_one_json_document(cache: Path) -> None:
    (listed,) = json.loads(run("list", cache.parent, "--json").stdout)
    assert listed["name"] == "cache"
    assert listed["url"] == str(cache)
    assert (listed["rows"], listed["top_k"], listed["problem"]) == (6, 5, None)
    assert listed["prefix"] == "You have forgotten it."


def test_an_empty_place_lists_nothing(tmp_path: Path) -> None:
    result = run("list", tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no teacher cache at or below it" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_take_a_url(cache: Path, command: str) -> None:
    result = run(command, f"file://{cache}")
    assert result.exit_code == 0, result.stderr
    assert "6" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("push", "nowhere", "x"), "error: nowhere: no such folder"),
        (("pull", "http://127.0.0.1:1/x?y=z", "x"), "error: http://127.0.0.1:1/x?...: expected"),
        (("list", "nothing://x"), "error: nothing://x: unknown protocol"),
        (("push", "s3://bucket/x", "x"), "error: s3://bucket/x: push takes a local cache"),
    ],
)
def test_failures_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_local_commands_do_not_load_the_network() -> None:
    script = (
        "import sys\n"
        "import duet_unlearn.cli.cache, duet_unlearn.teacher_cache.inspect\n"
        "print(sorted({'fsspec', 'aiohttp', 'huggingface_hub', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
