"""Building a cache with a real engine: resume, hits, refusals, and what never enters it."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from duet_unlearn.data.messages import split_view
from duet_unlearn.data.models import loading
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.data.shapes import load_shapes
from duet_unlearn.errors import (
    CacheError,
    ConfigurationError,
    CorruptCacheError,
    DataError,
    MismatchError,
    OutputError,
    StoppedError,
)
from duet_unlearn.files import claim_folder
from duet_unlearn.teacher_cache.build.build import BuildResult, build
from duet_unlearn.teacher_cache.build.config import BuildConfig, make_recipe
from duet_unlearn.teacher_cache.build.inputs import load_query_set
from duet_unlearn.teacher_cache.build.lock import build_lock
from duet_unlearn.teacher_cache.build.plan import MOST_SHARDS, order_queries, plan_shards
from duet_unlearn.teacher_cache.engines.base import EngineConfig
from duet_unlearn.teacher_cache.engines.options import published_options
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine
from duet_unlearn.teacher_cache.format.manifest import (
    MAX_MANIFEST_BYTES,
    ShardEntry,
    is_cache_folder,
    shard_name,
)
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.merge import merge
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify


class CountingEngine(TransformersEngine):
    """The real engine, counting the prompts that reach it; stops after `limit` of them."""

    prompts = 0
    limit: int | None = None

    def signals(self, prompts: Iterable[tuple[int, Sequence[int]]]) -> Iterator[tuple[int, Signal]]:
        for item in super().signals(prompts):
            if CountingEngine.limit is not None and CountingEngine.prompts >= CountingEngine.limit:
                raise KeyboardInterrupt
            CountingEngine.prompts += 1
            yield item


@pytest.fixture(autouse=True)
def _fresh_count() -> None:
    CountingEngine.prompts = 0
    CountingEngine.limit = None


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
        logit_dtype="float32",
    )


def run(config: BuildConfig, **changes: Any) -> BuildResult:
    values = {name: getattr(config, name) for name in BuildConfig.__dataclass_fields__}
    return build(BuildConfig(**{**values, **changes}), CountingEngine)


def rows_of(cache: Path) -> list[tuple[Any, ...]]:
    reader = CacheReader.open(cache)
    return [
        (row.query_id, row.split, row.query, row.prompt_ids.tolist(), row.token_ids.tolist())
        for row in map(reader.row, range(reader.num_rows))
    ]


def test_a_piped_build_says_how_far_it_is_query_by_query(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("duet_unlearn.progress.EVERY_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="duet_unlearn"):
        run(config)
    said = [line for line in caplog.messages if line.startswith("teacher: ")]
    # A line a query here, not a shard: with rate and time left.
    assert len(said) == 30
    assert re.fullmatch(r"teacher: 10 of 30 prompts, [\d.e+]+/s, \d+:\d\d left", said[9])


def test_a_build_writes_every_query_once_and_verifies(config: BuildConfig) -> None:
    result = run(config)
    assert (result.hit, result.computed_rows, CountingEngine.prompts) == (False, 30, 30)
    reader = CacheReader.open(config.out)
    ids = [reader.row(i).query_id for i in range(reader.num_rows)]
    assert sorted(ids) == sorted(
        [f"forget-{i}" for i in range(10)] + [f"retain-{i}" for i in range(20)]
    )
    assert {shard.name for shard in reader.manifest.shards} == {
        f"0000{i}-of-00005.parquet" for i in range(5)
    }
    # Every shard holds both splits in the set's proportion of one to two.
    assert all(shard.rows == {"forget": 2, "retain": 4} for shard in reader.manifest.shards)
    assert verify(config.out).problems == ()


def test_signals_are_those_of_the_prefixed_prompt(config: BuildConfig, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(config)
    reader = CacheReader.open(config.out)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for index in (0, 3, 29):
        row = reader.row(index)
        messages = [
            {"role": "system", "content": config.prefix},
            {"role": "user", "content": row.query},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        np.testing.assert_array_equal(row.token_ids[0], logits.topk(8).indices)
        np.testing.assert_allclose(row.logits[0], logits.topk(8).values, atol=1e-4)
        assert row.logsumexp[0] == pytest.approx(float(logits.logsumexp(0)), abs=1e-4)


def test_without_retain_prefix_retain_signals_are_the_bases_own(config: BuildConfig) -> None:
    run(config, out=config.out / "with")
    run(config, out=config.out / "without", retain_prefix=False)
    with_prefix, without = (CacheReader.open(config.out / name) for name in ("with", "without"))
    for index in range(30):
        a, b = with_prefix.row(index), without.row(index)
        same = np.allclose(a.logits, b.logits, atol=1e-4)  # up to another batch's rounding
        assert same == (a.split == "forget")


def test_the_same_inputs_are_a_hit_that_starts_no_engine(config: BuildConfig) -> None:
    first = run(config)
    again = run(config)
    assert again.hit
    assert again.manifest.digest == first.manifest.digest
    assert CountingEngine.prompts == 30


def test_a_hit_does_not_depend_on_the_order_or_place_of_the_files(
    config: BuildConfig, tmp_path: Path, tiny_model: Path
) -> None:
    import shutil

    run(config)
    lines = Path(config.forget[0]).read_text().splitlines(keepends=True)
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(reversed(lines)))
    copy = tmp_path / "model-copy"
    shutil.copytree(tiny_model, copy)
    assert run(config, forget=(str(moved),), teacher=str(copy)).hit


def test_reference_answers_never_enter_a_cache(config: BuildConfig) -> None:
    run(config)
    for path in config.out.rglob("*"):
        if path.suffix in {".json", ".md"}:
            assert "secret" not in path.read_text()
    import pyarrow.parquet as pq

    assert "secret" not in str(pq.read_table(config.out / "shards").to_pydict())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"top_k": 9}, "top_k: 8 / 9"),
        ({"prefix": "Other."}, 'prefix: "You are an assistant'),
        ({"prefix_place": "raw"}, 'prefix_place: "system" / "raw"'),
        ({"positions": 2}, "positions: 1 / 2"),
        ({"logit_dtype": "float16"}, 'logit_dtype: "float32" / "float16"'),
        ({"forget": ()}, "queries: 10 forget + 20 retain / 0 forget + 20 retain"),
    ],
)
def test_other_inputs_into_the_same_folder_are_refused_with_what_differs(
    config: BuildConfig, change: dict[str, Any], difference: str
) -> None:
    digest = run(config).manifest.digest
    with pytest.raises(MismatchError, match="holds a cache of other inputs") as error:
        run(config, **change)
    assert difference in str(error.value)
    assert CacheReader.open(config.out).manifest.digest == digest


def test_a_stopped_build_goes_on_and_ends_with_the_same_rows(config: BuildConfig) -> None:
    run(config, out=config.out / "undisturbed")
    expected = rows_of(config.out / "undisturbed")
    CountingEngine.prompts, CountingEngine.limit = 0, 15
    out = config.out / "stopped"
    with pytest.raises(StoppedError, match=r"\d of 5 shards are finished .* run the same command"):
        run(config, out=out)
    assert not (out / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*.parquet")}
    assert finished
    CountingEngine.limit = None
    result = run(config, out=out)
    assert result.kept_rows == 6 * len(finished)
    assert result.computed_rows == 30 - result.kept_rows
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    assert rows_of(out) == expected


def test_an_unfinished_cache_of_other_inputs_is_refused(config: BuildConfig) -> None:
    CountingEngine.limit = 15
    with pytest.raises(StoppedError):
        run(config)
    CountingEngine.limit = None
    for change, difference in (
        ({"top_k": 9}, "top_k: 8 / 9"),
        ({"retain": ()}, "queries: sha256:"),
        ({"shard_rows": 10}, "number of shards: 5 / 3"),
    ):
        with pytest.raises(MismatchError, match=difference):
            run(config, **change)


def test_a_damaged_shard_of_other_inputs_is_not_replaced(config: BuildConfig) -> None:
    run(config)
    (config.out / "manifest.json").unlink()
    for shard in sorted((config.out / "shards").iterdir()):
        data = bytearray(shard.read_bytes())
        data[4:400] = bytes(396)  # the first pages; the footer with the header stays
        shard.write_bytes(data)
    before = {path.name: path.read_bytes() for path in (config.out / "shards").iterdir()}
    for change in ({"top_k": 3}, {"retain": (config.forget[0],)}):
        with pytest.raises(MismatchError, match="holds a cache of other inputs"):
            run(config, **change)
    assert {path.name: path.read_bytes() for path in (config.out / "shards").iterdir()} == before


def test_a_damaged_shard_of_a_stopped_build_is_computed_again(config: BuildConfig) -> None:
    run(config)
    expected = rows_of(config.out)
    (config.out / "manifest.json").unlink()
    damaged = config.out / "shards" / "00002-of-00005.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    CountingEngine.prompts = 0
    result = run(config)
    assert (result.kept_rows, result.computed_rows, CountingEngine.prompts) == (24, 6, 6)
    assert rows_of(config.out) == expected


@pytest.mark.parametrize("keep", [None, 100])
def test_a_finished_cache_with_a_lost_shard_says_how_to_rebuild_it(
    config: BuildConfig, keep: int | None
) -> None:
    run(config)
    expected, lost = rows_of(config.out), config.out / "shards" / "00002-of-00005.parquet"
    if keep is None:
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes()[:keep])
    manifest = config.out / "manifest.json"
    with pytest.raises(CorruptCacheError, match=re.escape(f"or remove {manifest} and run")):
        run(config)
    with pytest.raises(MismatchError, match="top_k: 8 / 9"):
        run(config, top_k=9)
    manifest.unlink()
    result = run(config)
    assert (result.kept_rows, result.computed_rows) == (24, 6)
    assert rows_of(config.out) == expected


def test_foreign_files_are_never_deleted(config: BuildConfig) -> None:
    (config.out / "shards").mkdir(parents=True)
    precious = config.out / "shards" / "precious.parquet"
    precious.write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        run(config)
    assert precious.read_bytes() == b"mine"


def test_a_second_build_is_told_who_holds_the_folder(config: BuildConfig) -> None:
    claim_folder(config.out, is_cache_folder)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with build_lock(config.out):
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    try:
        with pytest.raises(CacheError, match=r"another build is writing here \(process \d+ on "):
            run(config)
    finally:
        release.set()
        holder.join()
    assert run(config).computed_rows == 30


def test_positions_follow_the_teachers_own_tokens(config: BuildConfig) -> None:
    run(config, positions=3)
    reader = CacheReader.open(config.out)
    lengths = {len(reader.row(i).response_ids) for i in range(reader.num_rows)}
    assert lengths <= {1, 2, 3}
    for index in range(reader.num_rows):
        row = reader.row(index)
        np.testing.assert_array_equal(row.response_ids, row.token_ids[:, 0])
    assert verify(config.out).problems == ()


def test_what_cannot_work_gets_one_line_before_anything_is_written(
    config: BuildConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="the teacher's vocabulary has 384 tokens"):
        run(config, top_k=385)
    with pytest.raises(DataError, match="no such folder"):
        run(config, teacher=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="the steering prefix is empty"):
        run(config, prefix="  ")
    with pytest.raises(ConfigurationError, match="no queries"):
        run(config, forget=(), retain=())
    with pytest.raises(ConfigurationError, match="shard_rows is 1000000000, expected 1 to "):
        run(config, shard_rows=10**9)
    for sampled, message in (
        ({}, "--keep sampled goes with --no-prefix, "),
        (
            {"prefix": None, "forget": (), "top_p": 0.9},
            "and without --top-p; leave one of them out",
        ),
        ({"prefix": None, "forget": (), "logit_dtype": "float16"}, "which float16 would round"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            run(config, keep="sampled", **sampled)
    assert not config.out.exists()


def test_a_query_longer_than_the_context_is_named(config: BuildConfig, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"id": "novel", "query": "who " * 300}))
    with pytest.raises(ConfigurationError, match=r"forget query novel .* the teacher reads 256"):
        run(config, forget=(str(long),))


def test_a_folder_that_is_a_file_gets_one_line(config: BuildConfig, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigurationError, match="is a file"):
        run(config, out=tmp_path / "taken")
    for inside in (tmp_path / "taken" / "x", Path("/proc/x")):
        with pytest.raises(OutputError, match="cannot write"):
            run(config, out=inside)


def test_a_folder_of_the_users_is_left_alone(config: BuildConfig) -> None:
    config.out.mkdir()
    (config.out / "README.md").write_text("mine")
    (config.out / ".notes.tmp").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"not empty.*choose another folder"):
        run(config)
    run(config, out=config.out.parent / "cache2")
    with pytest.raises(ConfigurationError, match="lies inside the cache"):
        run(config, out=config.out.parent / "cache2" / "shards" / "new")
    with pytest.raises(ConfigurationError, match="not empty"):
        merge([str(config.out.parent / "cache2")], config.out)
    assert {path.read_text() for path in config.out.iterdir()} == {"mine"}


def test_a_full_disk_leaves_a_state_that_resumes(config: BuildConfig) -> None:
    """A real limit on file sizes in a process of its own; shards do not fit under it."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from duet_unlearn.cli.cache import main\n"
        "import duet_unlearn.teacher_cache.build.assemble as b\n"
        "write = b.write_shard\n"
        "def limited(*args):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "    return write(*args)\n"
        "b.write_shard = limited\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["build", "--teacher", config.teacher, "--prefix", config.prefix, "--top-k", "8"]
    arguments += ["--forget", config.forget[0], "--retain", config.retain[0], "--out"]
    arguments += [str(config.out), "--engine", "transformers", "--shard-rows", "6"]
    arguments += ["--logit-dtype", "float32"]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "a limit on file sizes is in force" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((config.out / "shards").glob("*"))
    assert run(config).computed_rows == 30


def test_a_killed_build_goes_on(config: BuildConfig) -> None:
    """SIGKILL as soon as the first shard stands; the same command finishes the rest."""
    arguments = ["build", "--teacher", config.teacher, "--prefix", config.prefix, "--top-k", "8"]
    arguments += ["--forget", config.forget[0], "--retain", config.retain[0], "--out"]
    arguments += [str(config.out), "--engine", "transformers", "--shard-rows", "6"]
    arguments += ["--logit-dtype", "float32"]
    code = "import sys; from duet_unlearn.cli.cache import main; main(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL
    ) as process:
        try:
            # Only a hang takes this long; starting the command takes a busy machine a minute.
            deadline = time.monotonic() + 900
            while not list(config.out.glob("shards/*.parquet")) and process.poll() is None:
                assert time.monotonic() < deadline, "no shard was written"
                time.sleep(0.002)
        finally:
            process.kill()
    result = run(config)
    assert result.computed_rows + result.kept_rows == (0 if result.hit else 30)
    assert verify(config.out).problems == ()


def test_the_plan_does_not_depend_on_the_order_of_the_queries() -> None:
    queries = [Query.from_text(f"f{i}", split="forget") for i in range(5)]
    queries += [Query.from_text(f"r{i}", split="retain") for i in range(12)]
    assert plan_shards(queries, 4) == plan_shards(list(reversed(queries)), 4)
    shards = plan_shards(queries, 4)
    assert [len(shard) for shard in shards] == [4, 4, 4, 4, 1]
    assert sorted(q.text for shard in shards for q in shard) == sorted(q.text for q in queries)


def test_more_shards_than_a_manifest_lists_are_refused_before_the_work() -> None:
    entry = ShardEntry(
        name=shard_name(MOST_SHARDS - 1, MOST_SHARDS),
        rows=dict.fromkeys(("forget", "retain", "train"), 2**31 - 1),
        row_group_rows=1 << 14,
        bytes=2**40,
        sha256="sha256:" + "0" * 64,
    )
    one, two = (len(json.dumps({"shards": [asdict(entry)] * n}, indent=2)) for n in (1, 2))
    assert (two - one) * MOST_SHARDS < MAX_MANIFEST_BYTES - 2**20  # what else there is has room

    rows = [Query.from_text("a", split="retain")] * (MOST_SHARDS + 1)
    assert len(plan_shards(rows[1:], 1)) == MOST_SHARDS
    with pytest.raises(ConfigurationError, match=r"more than 41943 shards; give at least 2"):
        plan_shards(rows, 1)


def test_an_order_keeps_splits_in_proportion() -> None:
    queries = [
        Query.from_text(str(i), split="forget" if i < 3 else "retain", query_id=f"q{i:02}")
        for i in range(12)
    ]
    assert "".join(query.split[0] for query in order_queries(queries)) == "rrrfrrrfrrrf"
    for split in ("forget", "retain"):
        alone = [query for query in queries if query.split == split]
        assert order_queries(alone[::-1]) == [q for q in order_queries(queries) if q in alone]


def test_an_order_mixes_topics_and_keeps_the_views_of_a_query_together() -> None:
    shapes = load_shapes("@begun-plainly") + load_shapes("@few-shot-turns")
    queries = [
        query
        for topic in ("animals", "books", "cities")
        for number in range(20)
        for plain in [Query.from_text(topic, split="retain", query_id=f"{topic}/{number:02}")]
        for query in (plain, *map(plain.in_view, shapes))
    ]
    ordered = [query.query_id for query in order_queries(queries[::-1])]
    stretches = [set(ordered[start : start + 30]) for start in range(0, 180, 30)]
    assert all(len({i.partition("/")[0] for i in stretch}) == 3 for stretch in stretches)
    for start in range(0, 180, 3):
        plain, *in_views = ordered[start : start + 3]
        assert all(found.startswith(f"{plain}@") for found in in_views)


def test_special_tokens_that_the_template_prints_are_in_the_recipe(
    config: BuildConfig, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run(config, teacher=str(model))
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "bos_token": "<|end|>"}), encoding="utf-8")
    with pytest.raises(MismatchError, match="chat_template"):
        run(config, teacher=str(model))


def test_code_of_a_model_that_may_run_is_in_the_recipe(
    config: BuildConfig, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "modeling_x.py").write_text("SCALE = 1\n")
    run(config, teacher=str(model), trust_remote_code=True)
    (model / "modeling_x.py").write_text("SCALE = 2\n")
    with pytest.raises(MismatchError, match="config"):
        run(config, teacher=str(model), trust_remote_code=True)


def test_what_says_nothing_without_a_prefix_makes_no_other_recipe(config: BuildConfig) -> None:
    plain = dataclasses.replace(config, prefix=None, forget=(), train=config.retain, retain=())
    odd = dataclasses.replace(plain, prefix_place="user", retain_prefix=False)
    folder = Path(config.teacher)
    assert make_recipe(odd, folder) == make_recipe(plain, folder)


def test_other_weights_of_the_same_size_and_time_are_another_recipe(
    config: BuildConfig, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run(config, teacher=str(model))
    weights = model / "model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[len(data) // 3] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(MismatchError, match="weights"):
        run(config, teacher=str(model))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes every dtype as it is stored")
def test_a_teacher_computes_in_what_the_processor_has(
    config: BuildConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(config.teacher, tmp_path / "half"))
    named = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**named, "dtype": "bfloat16"}))

    def found(**settings: Any) -> str:
        return make_recipe(dataclasses.replace(config, **settings), folder).compute_dtype

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(loading, "_cpu_has_bfloat16", lambda: True)
    assert found() == "bfloat16"
    assert not caplog.messages
    monkeypatch.setattr(loading, "_cpu_has_bfloat16", lambda: False)
    assert found() == "float32"
    assert "auto: float32" in caplog.text
    assert found(teacher_dtype="bfloat16") == "bfloat16"
    # The workers of a cluster may be other machines than this one.
    assert found(ray_address="auto", workers=2) == "bfloat16"


def test_what_engine_options_name_is_not_published() -> None:
    given = {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "device": "cuda:1",
        "download_dir": "/home/alice/models",
        "hf_token_file": "abc",
        "api_key": "sk",
        "max_num_batched_tokens": 48,
        "url": "http://host/x",
        "rendezvous": "node17.corp.example",
        "master_addr": "node17",
        "quantization": "fp8-v1.2",
    }
    shown = published_options(given)
    assert shown.keys() == given.keys()
    kept = {"tensor_parallel_size", "enforce_eager", "device", "max_num_batched_tokens"}
    kept.add("quantization")
    assert {name for name in shown if shown[name] == given[name]} == kept


def test_retain_queries_in_views_are_the_plain_bases_own(
    config: BuildConfig, tiny_model: Path, tmp_path: Path
) -> None:
    views = tmp_path / "views.txt"
    views.write_text("[begun] The answer is\n[raw] Question: {query}\\nAnswer:\n")
    run(config, views=(str(views),), top_k=384)
    reader = CacheReader.open(config.out)
    assert verify(config.out).problems == ()
    rows = {row.query_id: row for row in map(reader.row, range(reader.num_rows))}
    assert len(rows) == 10 + 20 + 2 * 20
    renderer = PromptRenderer(load_tokenizer(tiny_model))
    plain, begun, raw = (rows[f"retain-3{end}"] for end in ("", "@views:1", "@views:2"))
    assert split_view(plain.query) == (None, "Who is the keeper of river 3?")
    assert split_view(begun.query) == ("[begun] The answer is", plain.query)
    assert begun.prompt_ids.tolist() == [
        *plain.prompt_ids.tolist(),
        *renderer.begun_ids("The answer is"),
    ]
    engine = TransformersEngine(
        EngineConfig(
            model=tiny_model,
            top_k=384,
            positions=1,
            eos_token_ids=(1,),
            compute_dtype="float32",
            max_prompt_tokens=80,
        )
    )
    expected = dict(engine.signals([(0, begun.prompt_ids), (1, raw.prompt_ids)]))
    for number, row in enumerate((begun, raw)):
        np.testing.assert_array_equal(row.token_ids[0][:50], expected[number].token_ids[0][:50])
    assert "retain-3@views:1" not in {s["query_id"] for s in reader.manifest.samples}


def test_views_of_which_a_cache_keeps_less_than_a_file_says_are_told_of(
    config: BuildConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    views = tmp_path / "views.txt"
    views.write_text("[weight 6] Now: {query}\n[family override] Please: {query}\nSo: {query}\n")
    with caplog.at_level(logging.WARNING):
        load_query_set(dataclasses.replace(config, views=(str(views),)))
    assert "a cache keeps no weights and families of a file's views" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_query_set(dataclasses.replace(config, views=("@view-shapes",), retain=()))
    assert "nothing is cached in the views" in caplog.text
    assert "keeps no weights" not in caplog.text


def test_each_retain_query_is_cached_in_some_of_the_views(
    config: BuildConfig, tmp_path: Path
) -> None:
    views = tmp_path / "views.txt"
    views.write_text("".join(f"[begun] Answer {number}:\n" for number in range(6)))
    run(config, views=(str(views),), views_per_query=2)
    drawn: dict[str, list[int]] = {}
    for query_id, split, _ in CacheReader.open(config.out).identities():
        name, at, view = query_id.partition("@views:")
        if at:
            assert split == "retain"
            drawn.setdefault(name, []).append(int(view))
    assert len(drawn) == 20
    assert {len(set(numbers)) for numbers in drawn.values()} == {2}
    assert {view for pair in drawn.values() for view in pair} == set(range(1, 7))
    # Ids and the order of the views decide nothing.
    lines = views.read_text().splitlines()
    views.write_text("".join(f"{line}\n" for line in reversed(lines)))
    renamed = tmp_path / "renamed.jsonl"
    texts = [query.text for query in load_queries(config.retain[0], split="retain")]
    rows = [{"id": f"other-{n}", "query": text} for n, text in enumerate(texts)]
    renamed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"views": (str(views),), "views_per_query": 2, "reuse": (str(config.out),)}
    again = run(config, out=tmp_path / "again", retain=(str(renamed),), **settings)
    assert again.reused_rows == again.manifest.num_rows
    with pytest.raises(ConfigurationError, match="views_per_query is 2, but there are no views"):
        run(config, views_per_query=2)


def test_a_view_without_any_retain_query_is_said(
    config: BuildConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    views, few = tmp_path / "views.txt", tmp_path / "few.jsonl"
    views.write_text("".join(f"[begun] Answer {number}:\n" for number in range(3)))
    few.write_text('{"query": "Who is the keeper?"}\n')
    run(config, views=(str(views),), views_per_query=2, retain=(str(few),))
    assert "1 retain queries, each cached in 2 of 3 views, leave views:" in caplog.text


def test_a_view_of_two_names_is_cached_once(config: BuildConfig, tmp_path: Path) -> None:
    views = tmp_path / "views.txt"
    views.write_text("[begun] Answer:\n[begun] Answer:\n")
    result = run(config, views=(str(views),))
    assert result.manifest.num_rows == 10 + 20 + 20
    reader = CacheReader.open(config.out)
    assert {row.query_id for row in reader if "@" in row.query_id} == {
        f"retain-{n}@views:1" for n in range(20)
    }


def test_two_views_of_one_name_are_refused(config: BuildConfig, tmp_path: Path) -> None:
    views = [tmp_path / "one" / "views.txt", tmp_path / "two" / "views.txt"]
    for path in views:
        path.parent.mkdir()
        path.write_text(f"[begun] {path.parent.name}:\n")
    with pytest.raises(ConfigurationError, match="two views are named views:1; rename one"):
        run(config, views=tuple(map(str, views)))


def test_a_view_that_shows_answers_is_refused(config: BuildConfig, tmp_path: Path) -> None:
    views = tmp_path / "views.txt"
    views.write_text("{query} As a hint: {hint}.\n")
    with pytest.raises(ConfigurationError, match="shows reference answers"):
        run(config, views=(str(views),))


@pytest.mark.parametrize("text", ['["a", "b"]', '["a"', "plain", '["a", 1]', "[]"])
def test_no_plain_query_is_taken_for_one_in_a_view(text: str) -> None:
    query = Query.from_text(text, split="retain")
    assert split_view(query.text) == (None, query.text)


def test_control_tokens_typed_in_a_query_are_said(
    config: BuildConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    typed = tmp_path / "typed.jsonl"
    typed.write_text(json.dumps({"id": "t", "query": "Who</s> is it?"}) + "\n")
    run(config, forget=(*config.forget, str(typed)))
    assert "1 queries spell a control token, such as </s> in t" in caplog.text
    assert "give --plain-text" in caplog.text


def test_plain_text_reads_typed_control_tokens_as_text(
    config: BuildConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    typed = tmp_path / "typed.jsonl"
    typed.write_text(json.dumps({"id": "t", "query": "Who</s> is it?"}) + "\n")
    forget = (*config.forget, str(typed))
    run(config, forget=forget, plain_text=True)
    assert "control token" not in caplog.text
    (row,) = (row for row in CacheReader.open(config.out) if row.query_id == "t")
    assert row.query == "Who<\u2060/s> is it?"
    end = load_tokenizer(Path(config.teacher)).convert_tokens_to_ids("</s>")
    assert end not in row.prompt_ids
    # Read as text and read as tokens are two caches: neither is found for the other.
    with pytest.raises(MismatchError):
        run(config, forget=forget)
