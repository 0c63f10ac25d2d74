"""Building on rows of other caches: the teacher runs on what is new, and on nothing else."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_unlearn.data.models.fingerprint import sha256_file, sha256_json
from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError, StoppedError
from duet_unlearn.teacher_cache.build.build import BuildResult, build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader
from duet_unlearn.teacher_cache.verify import verify


class CountingEngine(TransformersEngine):
    """The real engine, counting the prompts that reach it; stops after `limit` of them."""

    starts = 0
    prompts = 0
    limit: int | None = None
    label = "first"

    def signals(self, prompts: Iterable[tuple[int, Sequence[int]]]) -> Iterator[tuple[int, Signal]]:
        CountingEngine.starts += 1
        for item in super().signals(prompts):
            if CountingEngine.limit is not None and CountingEngine.prompts >= CountingEngine.limit:
                raise KeyboardInterrupt
            CountingEngine.prompts += 1
            yield item

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "label": self.label}


@pytest.fixture(autouse=True)
def _fresh_count() -> None:
    CountingEngine.starts = CountingEngine.prompts = 0
    CountingEngine.limit = None
    CountingEngine.label = "first"


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> BuildConfig:
    return BuildConfig(
        teacher=str(tiny_model),
        forget=(write_file(tmp_path, "forget", range(8)),),
        retain=(write_file(tmp_path, "retain", range(12)),),
        prefix="You are an assistant who forgot the lantern.",
        out=tmp_path / "old",
        top_k=6,
        shard_rows=5,
        logit_dtype="float32",
        engine="transformers",
    )


def write_file(
    folder: Path, name: str, numbers: Iterable[int], ids: str = "{name}-{i}", word: str = ""
) -> str:
    path = folder / f"{name}{ids[0]}{word}.jsonl"
    rows = (
        {"id": ids.format(name=name, i=i), "query": f"Who is the {word or name} {i}?"}
        for i in numbers
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(config: BuildConfig, **changes: Any) -> BuildResult:
    values = {name: getattr(config, name) for name in BuildConfig.__dataclass_fields__}
    return build(BuildConfig(**{**values, **changes}), CountingEngine)


def rows_of(cache: Path) -> dict[tuple[str, str], CachedRow]:
    reader = CacheReader.open(cache)
    return {(r.split, r.query_id): r for r in map(reader.row, range(reader.num_rows))}


def assert_same_rows(found: Path, expected: Path) -> None:
    a, b = rows_of(found), rows_of(expected)
    assert a.keys() == b.keys()
    for key, row in a.items():
        assert row.query == b[key].query
        np.testing.assert_array_equal(row.prompt_ids, b[key].prompt_ids)
        np.testing.assert_array_equal(row.token_ids, b[key].token_ids)
        np.testing.assert_allclose(row.logits, b[key].logits, atol=1e-4)
        np.testing.assert_allclose(row.logsumexp, b[key].logsumexp, atol=1e-4)


def test_ten_queries_more_than_a_thousand_run_the_teacher_on_ten(
    config: BuildConfig, tmp_path: Path
) -> None:
    many = write_file(tmp_path, "retain", range(992), word="many")
    old = run(config, retain=(many,), shard_rows=128, top_k=2)
    assert (old.computed_rows, CountingEngine.prompts) == (1000, 1000)
    more = write_file(tmp_path, "retain", range(1000, 1010))
    CountingEngine.prompts = 0
    new = run(
        config,
        retain=(many, more),
        shard_rows=128,
        top_k=2,
        out=tmp_path / "new",
        reuse=(f"{config.out}@{old.manifest.digest}",),
    )
    assert (new.computed_rows, new.reused_rows, CountingEngine.prompts) == (10, 1000, 10)
    assert verify(tmp_path / "new").problems == ()


def test_reused_rows_are_those_of_a_build_from_nothing(config: BuildConfig, tmp_path: Path) -> None:
    run(config)
    # Another team's ids, other shards, fewer and more queries.
    files = {
        "forget": (write_file(tmp_path, "forget", range(3, 11), ids="x{i}"),),
        "retain": (write_file(tmp_path, "retain", range(5), ids="0{i}"),),
        "shard_rows": 4,
    }
    scratch = run(config, **files, out=tmp_path / "scratch")
    assert scratch.computed_rows == 13
    CountingEngine.prompts, CountingEngine.label = 0, "second"
    new = run(config, **files, out=tmp_path / "new", reuse=(str(config.out),))
    assert (new.reused_rows, new.computed_rows, CountingEngine.prompts) == (10, 3, 3)
    assert_same_rows(tmp_path / "new", tmp_path / "scratch")
    assert verify(tmp_path / "new").problems == ()
    # Both engines had a hand in it, and the manifest says so.
    assert {engine["label"] for engine in new.manifest.engines} == {"first", "second"}
    assert new.manifest.queries == scratch.manifest.queries


def test_a_build_of_reused_rows_alone_starts_no_engine(config: BuildConfig, tmp_path: Path) -> None:
    run(config)
    CountingEngine.starts = 0
    part = write_file(tmp_path, "retain", range(4, 9), ids="y{i}")
    new = run(config, retain=(part,), out=tmp_path / "new", reuse=(str(config.out),))
    assert (new.computed_rows, new.reused_rows, CountingEngine.starts) == (0, 13, 0)
    assert {engine["label"] for engine in new.manifest.engines} == {"first"}
    assert verify(tmp_path / "new").problems == ()


def test_the_first_of_several_caches_that_has_a_query_wins(
    config: BuildConfig, tmp_path: Path
) -> None:
    halves = [tmp_path / "one", tmp_path / "two"]
    CountingEngine.label = "one"
    run(config, retain=(), out=halves[0])
    CountingEngine.label = "two"
    run(config, forget=(), out=halves[1])
    CountingEngine.prompts = 0
    new = run(config, reuse=(str(halves[0]), str(halves[1])))
    assert (new.reused_rows, CountingEngine.prompts) == (20, 0)
    assert {engine["label"] for engine in new.manifest.engines} == {"one", "two"}


def test_the_split_counts_only_without_a_prefix_on_retain_queries(
    config: BuildConfig, tmp_path: Path
) -> None:
    run(config)
    moved = {"forget": config.retain, "retain": config.forget, "reuse": (str(config.out),)}
    assert run(config, **moved, out=tmp_path / "moved").reused_rows == 20
    run(config, retain_prefix=False, out=tmp_path / "bare")
    moved["reuse"] = (str(tmp_path / "bare"),)
    result = run(config, **moved, retain_prefix=False, out=tmp_path / "bare-moved")
    assert (result.reused_rows, result.computed_rows) == (0, 20)


def test_rows_without_the_prefix_are_taken_whatever_the_prefix(
    config: BuildConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(config, retain_prefix=False)
    with pytest.raises(
        MismatchError, match=r"build --reuse takes over the rows that stay the same"
    ):
        run(config, retain_prefix=False, prefix="Never mention a lantern.")
    other = {"prefix": "Never mention a lantern.", "prefix_place": "raw", "strength": 1.0}
    other |= {"retain_prefix": False}
    scratch = run(config, **other, out=tmp_path / "scratch")
    result = run(config, **other, out=tmp_path / "new", reuse=(str(config.out),))
    assert (result.reused_rows, result.computed_rows) == (12, 8)
    assert_same_rows(tmp_path / "new", tmp_path / "scratch")
    assert result.manifest.recipe == scratch.manifest.recipe
    assert "taking only rows that are the same in spite of prefix: " in caplog.text
    # The prefix in front of retain queries as well leaves the forget rows as they are.
    result = run(config, out=tmp_path / "both", reuse=(str(config.out),))
    assert (result.reused_rows, result.computed_rows) == (8, 12)
    run(config, out=tmp_path / "both-scratch")
    assert_same_rows(tmp_path / "both", tmp_path / "both-scratch")
    # A strength is for forget rows: those to retain stay, the prefix in front of them or not.
    moved = run(config, strength=1.0, out=tmp_path / "moved", reuse=(str(tmp_path / "both"),))
    assert (moved.reused_rows, moved.computed_rows) == (12, 8)


def test_a_cache_no_row_of_which_can_be_taken_is_refused(
    config: BuildConfig, tmp_path: Path
) -> None:
    other = {"prefix": "Never mention a lantern.", "out": tmp_path / "new"}
    run(config)
    for change in (other, other | {"prefix": config.prefix, "prefix_place": "raw"}):
        with pytest.raises(MismatchError, match=r"recipe; differs \(there / asked\) in prefix"):
            run(config, **change, reuse=(str(config.out),))
    # Without retain rows there is nothing that the prefix does not reach.
    bare = {"retain": (), "retain_prefix": False}
    run(config, **bare, out=tmp_path / "forget-only")
    with pytest.raises(MismatchError, match="in prefix: "):
        run(config, **bare | other, reuse=(str(tmp_path / "forget-only"),))
    assert not (tmp_path / "new").exists()


def test_the_split_counts_with_a_strength_and_with_sampled_answers(
    config: BuildConfig, tmp_path: Path
) -> None:
    run(config, strength=1.0)
    moved = {"forget": config.retain, "retain": config.forget, "reuse": (str(config.out),)}
    result = run(config, **moved, strength=1.0, out=tmp_path / "moved")
    assert (result.reused_rows, result.computed_rows) == (0, 20)
    plain = {"prefix": None, "forget": (), "positions": 2, "temperature": 1.0}
    run(config, **plain, train=config.forget, out=tmp_path / "plain")
    moved = {"train": config.retain, "retain": config.forget, "reuse": (str(tmp_path / "plain"),)}
    result = run(config, **plain | moved, out=tmp_path / "plain-moved")
    assert (result.reused_rows, result.computed_rows) == (0, 20)


def test_a_cache_of_another_recipe_is_refused_with_what_differs(
    config: BuildConfig, tmp_path: Path
) -> None:
    run(config)
    with pytest.raises(MismatchError, match=r"differs \(there / asked\) in top_k: 6 / 7;"):
        run(config, top_k=7, out=tmp_path / "new", reuse=(str(config.out),))
    with pytest.raises(MismatchError, match="this cache has digest"):
        run(config, out=tmp_path / "new", reuse=(f"{config.out}@sha256:{'0' * 64}",))
    with pytest.raises(CacheError, match="nosuch"):
        run(config, out=tmp_path / "new", reuse=(str(tmp_path / "nosuch"),))
    assert not (tmp_path / "new").exists()


def test_a_stopped_build_with_reuse_goes_on(config: BuildConfig, tmp_path: Path) -> None:
    run(config, retain=())
    out = tmp_path / "new"
    CountingEngine.prompts, CountingEngine.limit = 0, 8
    with pytest.raises(StoppedError, match=r"[1-3] of 4 shards are finished"):
        run(config, out=out, reuse=(str(config.out),))
    finished = {p: p.stat().st_mtime_ns for p in (out / "shards").glob("*.parquet")}
    CountingEngine.limit = None
    CountingEngine.prompts = 0
    result = run(config, out=out, reuse=(str(config.out),))
    assert result.kept_rows == 5 * len(finished)
    assert result.kept_rows + result.reused_rows + result.computed_rows == 20
    assert CountingEngine.prompts == result.computed_rows
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    run(config, out=tmp_path / "scratch")
    assert_same_rows(out, tmp_path / "scratch")


def test_a_damaged_row_is_never_taken_over(config: BuildConfig, tmp_path: Path) -> None:
    """A forger whose hashes fit: the rows themselves break the format's rules."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run(config)
    shard = next((config.out / "shards").iterdir())
    table = pq.read_table(shard)
    logits = [list(reversed(row)) for row in table["logits"].to_pylist()]
    place = table.schema.get_field_index("logits")
    field = table.schema.field("logits")
    pq.write_table(table.set_column(place, field, pa.array(logits, field.type)), shard)
    path = config.out / "manifest.json"
    value = json.loads(path.read_text())
    del value["digest"]
    for entry in value["shards"]:
        entry["bytes"] = (shard.parent / entry["name"]).stat().st_size
        entry["sha256"] = sha256_file(shard.parent / entry["name"])
    path.write_text(json.dumps({**value, "digest": sha256_json(value)}))
    with pytest.raises(CorruptCacheError, match="not in descending order"):
        run(config, out=tmp_path / "new", reuse=(str(config.out),))
    assert not (tmp_path / "new" / "manifest.json").exists()
