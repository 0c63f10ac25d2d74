"""Building a cache in parts, and finishing it: `build --shards I/N`, then `finish`."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.cache import main
from duet_unlearn.errors import CacheError, ConfigurationError, MismatchError
from duet_unlearn.teacher_cache.build import lock
from duet_unlearn.teacher_cache.build.build import build, build_part
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.finish import finish
from duet_unlearn.teacher_cache.build.lock import build_lock, part_lock
from duet_unlearn.teacher_cache.build.parts import Part
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PROBE_SECONDS", 0.05)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, write_queries: Any) -> BuildConfig:
    return BuildConfig(
        teacher=str(tiny_model),
        forget=(str(write_queries("forget", 10)),),
        retain=(str(write_queries("retain", 20, "river")),),
        prefix="You are an assistant who forgot the lantern.",
        out=tmp_path / "cache",
        top_k=8,
        shard_rows=6,
        engine="transformers",
    )


def parts(count: int) -> list[Part]:
    return [Part(number=number, count=count) for number in range(1, count + 1)]


def test_parts_cover_every_shard_once() -> None:
    for shards in (1, 5, 12):
        for count in (1, 3, 8):
            found = [list(part.indices(shards)) for part in parts(count)]
            assert sorted(index for part in found for index in part) == list(range(shards))
            assert max(map(len, found)) - min(map(len, found)) <= 1
            for part, indices in zip(parts(count), found, strict=True):
                assert all(Part.of_shard(index, count) == part for index in indices)


def test_a_damaged_footer_is_a_damaged_shard(config: BuildConfig) -> None:
    build_part(config, Part(number=1, count=1))
    shard = config.out / "shards" / "00000-of-00005.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(
        CacheError, match=r"1 of 5 shards missing or damaged \(00000.* --shards 1/1"
    ):
        finish(config.out)


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "-1/8", "1", "1/8/2", "a/b", ""])
def test_a_part_is_one_of_its_count(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"1/8"):
        Part.parse(text)


def test_parts_join_into_the_cache_that_one_build_makes(config: BuildConfig) -> None:
    whole = build(replace(config, out=config.out / "whole")).manifest
    out = config.out / "parts"
    # In any order, and some of them twice.
    for number, shards, rows in ((3, 1, 6), (1, 2, 12), (2, 2, 12), (1, 2, 0)):
        result = build_part(replace(config, out=out), Part(number=number, count=3))
        assert (result.shards, result.all_shards, result.computed_rows) == (shards, 5, rows)
        assert not (out / "manifest.json").exists()
    result = finish(out)
    assert not result.hit
    assert result.manifest == whole
    for path in ("manifest.json", "README.md", *(f"shards/{s.name}" for s in whole.shards)):
        assert (out / path).read_bytes() == (config.out / "whole" / path).read_bytes()
    assert verify(out).problems == ()
    assert [path.name for path in out.glob(".part*")] == []
    assert finish(out).hit
    assert build_part(replace(config, out=out), Part(number=2, count=3)).hit
    assert build(replace(config, out=out)).hit


def test_a_build_of_all_shards_finishes_what_parts_began(config: BuildConfig) -> None:
    build_part(config, Part(number=2, count=3))
    result = build(config)
    assert (result.kept_rows, result.computed_rows) == (12, 18)
    assert [path.name for path in config.out.glob(".part*")] == []


def test_a_missing_shard_is_named_with_the_command_that_makes_it(
    config: BuildConfig, tmp_path: Path
) -> None:
    for number in (1, 3):
        build_part(config, Part(number=number, count=3))
    with pytest.raises(CacheError, match="2 of 5 shards missing or damaged") as error:
        finish(config.out)
    said = str(error.value)
    assert "(00001-of-00005.parquet, 00004-of-00005.parquet)" in said
    command = said.split("part 2/3 did not finish, run: ")[1]
    assert command.startswith("duet-cache build --teacher ")
    code = "import sys; from duet_unlearn.cli.cache import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(command)[1:]],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"{config.out}: part 2/3 has its 2 of 5 shards (12 queries computed)" in done.stdout
    assert done.stdout.endswith(f"duet-cache finish {config.out}\n")
    assert finish(config.out).manifest.num_rows == 30


def test_a_damaged_shard_is_named_and_made_again(config: BuildConfig) -> None:
    for part in parts(2):
        build_part(config, part)
    damaged = config.out / "shards" / "00003-of-00005.parquet"
    data = bytearray(damaged.read_bytes())
    logits = pq.read_metadata(damaged).row_group(0).column(6)
    data[logits.data_page_offset + logits.total_compressed_size - 9] ^= 255
    damaged.write_bytes(data)
    with pytest.raises(
        CacheError, match=r"1 of 5 shards missing or damaged \(00003.* --shards 2/2"
    ):
        finish(config.out)
    assert build_part(config, Part(number=2, count=2)).computed_rows == 6
    assert finish(config.out).manifest.num_rows == 30


def test_parts_of_other_inputs_are_refused(config: BuildConfig, tiny_model: Path) -> None:
    build_part(config, Part(number=1, count=2))
    for change, difference in (
        ({"top_k": 9}, "top_k: 8 / 9"),
        ({"retain": ()}, "queries: sha256:"),
        ({"shard_rows": 10}, "number of shards: 5 / 3"),
    ):
        with pytest.raises(MismatchError, match=difference):
            build_part(replace(config, **change), Part(number=2, count=2))


def test_shards_that_do_not_belong_together_are_not_joined(config: BuildConfig) -> None:
    for part in parts(2):
        build_part(config, part)
    other = replace(config, out=config.out / "other", prefix="Another prefix.")
    build_part(other, Part(number=1, count=2))
    name = "00002-of-00005.parquet"
    own = (config.out / "shards" / name).read_bytes()
    shutil.copy(other.out / "shards" / name, config.out / "shards" / name)
    with pytest.raises(MismatchError, match=rf"{name}: not of the same build .* prefix: "):
        finish(config.out)
    (config.out / "shards" / name).write_bytes(own)
    shutil.copy(config.out / "shards" / name, config.out / "shards" / "00004-of-00005.parquet")
    with pytest.raises(MismatchError, match=r"shard: 2 of 5 / 00004-of-00005"):
        finish(config.out)
    assert not (config.out / "manifest.json").exists()


def test_finish_needs_the_tokenizer_of_the_build(
    config: BuildConfig, tmp_path: Path, tiny_model: Path
) -> None:
    moved = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    build_part(replace(config, teacher=str(moved)), Part(number=1, count=1))
    shutil.rmtree(moved)
    with pytest.raises(CacheError, match=r"needs the teacher's tokenizer .*; give --teacher"):
        finish(config.out)
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MismatchError, match="built with tokenizer sha256:"):
        finish(config.out, str(other))
    for notes in config.out.glob(".part*.json"):
        notes.unlink()
    with pytest.raises(CacheError, match="give --teacher MODEL"):
        finish(config.out)
    assert finish(config.out, str(tiny_model)).manifest.teacher == "tiny"


@pytest.mark.parametrize(("folder", "line"), [("nowhere", "no shards folder"), ("e", "no shards")])
def test_finish_of_a_folder_without_shards_is_one_line(
    tmp_path: Path, folder: str, line: str
) -> None:
    (tmp_path / "e" / "shards").mkdir(parents=True)
    with pytest.raises(CacheError, match=line):
        finish(tmp_path / folder)


@contextmanager
def holding(config: BuildConfig, what: str) -> Iterator[int]:
    """A live process that holds the whole folder or a part such as `1/2`; gives its id."""
    code = (
        "import sys; from pathlib import Path\n"
        "from duet_unlearn.teacher_cache.build.lock import build_lock, part_lock\n"
        "from duet_unlearn.teacher_cache.build.parts import Part\n"
        "where, what = Path(sys.argv[1]), sys.argv[2]\n"
        "hold = build_lock(where) if what == 'all' else part_lock(where, Part.parse(what))\n"
        "with hold:\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    config.out.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(config.out), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_who_may_build_beside_whom(config: BuildConfig) -> None:
    first, second = parts(2)
    with holding(config, "1/2") as pid:
        for job, line in (
            (lambda: build_part(config, first), "part 1/2 is being built already"),
            (lambda: build_part(config, Part(number=3, count=4)), "part 1/2 is being built here"),
            (lambda: build(config), "part 1/2 is being built here"),
            (lambda: finish(config.out), "part 1/2 is being built here"),
        ):
            (config.out / "shards").mkdir(exist_ok=True)
            with pytest.raises(CacheError, match=rf"{line} \(process {pid} on "):
                job()
        assert build_part(config, second).computed_rows == 12
    # The holder was killed: what it left blocks nobody.
    assert build_part(config, first).computed_rows == 18
    with holding(config, "all") as pid:
        with pytest.raises(CacheError, match=rf"all shards is writing here \(process {pid} on "):
            build_part(config, second)
        with pytest.raises(CacheError, match=rf"another build is writing here \(process {pid} "):
            finish(config.out)
    assert not finish(config.out).hit


def test_locks_exclude_each_other_from_either_side(tmp_path: Path) -> None:
    first, second = parts(2)
    cases: list[tuple[Callable[[], Any], Callable[[], Any], bool]] = [
        (lambda: part_lock(tmp_path, first), lambda: part_lock(tmp_path, second), True),
        (lambda: part_lock(tmp_path, first), lambda: part_lock(tmp_path, first), False),
        (lambda: part_lock(tmp_path, first), lambda: part_lock(tmp_path, Part(3, 1)), False),
        (lambda: part_lock(tmp_path, first), lambda: build_lock(tmp_path), False),
        (lambda: build_lock(tmp_path), lambda: part_lock(tmp_path, first), False),
        (lambda: build_lock(tmp_path), lambda: build_lock(tmp_path), False),
    ]
    for holder, comer, allowed in cases:
        with holder():
            if allowed:
                with comer():
                    pass
            else:
                with pytest.raises(CacheError, match=rf"process {os.getpid()} on "), comer():
                    pytest.fail("both hold the folder")
        with comer():
            pass


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_of_a_slurm_array(config: BuildConfig) -> None:
    words: list[object] = ["build", "--teacher", config.teacher, "--forget", config.forget[0]]
    words += ["--retain", config.retain[0], "--prefix", config.prefix, "--out", config.out]
    words += ["--engine", "transformers", "--top-k", 8, "--shard-rows", 6]
    words += ["--engine-arg", "batch-rows=3", "--json", "--shards"]
    for part in parts(6):
        result = invoke(*words, part)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["shards"] == (1 if part.number < 6 else 0)
    result = invoke("finish", config.out, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["hit"], document["rows"], document["shards"]) == (False, 30, 5)
    engines = CacheReader.open(config.out).manifest.engines
    assert [engine["options"] for engine in engines] == [{"batch_rows": 3}]
    result = invoke(*words, "0/6")
    assert result.exit_code == 2
    assert "eight of them are 1/8 to 8/8; for a Slurm array that is --array=1-8" in result.stderr
