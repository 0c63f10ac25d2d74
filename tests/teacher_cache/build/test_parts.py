"""Building a cache in parts: `build --shards I/N`, then `merge`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.cache import main
from duet_unlearn.data.messages import Message
from duet_unlearn.data.queries import Query
from duet_unlearn.errors import ConfigurationError, MismatchError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.plan import Part
from duet_unlearn.teacher_cache.merge import merge
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify


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


def build_parts(config: BuildConfig, count: int) -> list[Path]:
    folders = [config.out.parent / f"part-{number}" for number in range(1, count + 1)]
    for number, folder in enumerate(folders, start=1):
        build(replace(config, out=folder, part=Part(number=number, count=count)))
    return folders


def queries(forget: int, retain: int) -> list[Query]:
    return [
        Query(
            query_id=f"{split}-{n}",
            split=split,
            messages=(Message(role="user", content=f"{split} {n}"),),
            answer=None,
        )
        for split, count in (("forget", forget), ("retain", retain))
        for n in range(count)
    ]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_parts_cover_every_query_once_with_both_splits(count: int) -> None:
    asked = queries(20, 40)
    found = [Part(number=n, count=count).select(asked) for n in range(1, count + 1)]
    assert sorted(q.query_id for part in found for q in part) == sorted(q.query_id for q in asked)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    for part in found:
        forget = sum(query.split == "forget" for query in part)
        assert abs(forget - len(part) / 3) <= 1


def test_more_parts_than_queries_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 queries cannot be cut into 4 parts"):
        Part(number=4, count=4).select(queries(1, 2))


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "-1/8", "1", "1/8/2", "a/b", ""])
def test_a_part_is_one_of_its_count(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"1/8"):
        Part.parse(text)


def test_parts_join_into_the_cache_that_one_build_makes(config: BuildConfig) -> None:
    whole = build(config).manifest
    folders = build_parts(config, 3)
    assert [CacheReader.open(folder).manifest.num_rows for folder in folders] == [10, 10, 10]
    # In any order.
    out = config.out.parent / "joined"
    manifest = merge([str(folders[i]) for i in (2, 0, 1)], out, shard_rows=6).manifest
    assert verify(out).problems == ()
    assert (manifest.recipe_id, manifest.queries) == (whole.recipe_id, whole.queries)
    assert manifest.part is None
    one, joined = CacheReader.open(config.out), CacheReader.open(out)
    for ours, theirs in zip(
        map(joined.row, range(30)), map(one.row, range(one.num_rows)), strict=True
    ):
        assert (ours.split, ours.query_id, ours.query) == (
            theirs.split,
            theirs.query_id,
            theirs.query,
        )
        # Batches were cut differently: floats are close, not equal.
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-2)
        np.testing.assert_allclose(ours.logsumexp, theirs.logsumexp, atol=1e-3)


def test_a_text_under_two_ids_is_one_row_in_any_order_of_files_and_in_parts(
    config: BuildConfig,
) -> None:
    paths = [config.out.parent / f"repeated-{name}.jsonl" for name in "ab"]
    for path, first in zip(paths, (4, 0), strict=True):
        rows = [{"id": str(first + i), "query": f"Who is {i}?"} for i in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(config, retain=tuple(map(str, paths)))
    whole = build(config).manifest
    assert whole.num_rows == 10 + 4
    assert build(replace(config, retain=config.retain[::-1])).hit
    parts = [str(folder) for folder in build_parts(config, 2)]
    assert merge(parts, config.out.parent / "joined").manifest.queries == whole.queries
    # An id that was dropped still stands for its text.
    other = config.out.parent / "other.jsonl"
    other.write_text(json.dumps({"id": "5", "query": "Who else?"}) + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="id 5 stands for two different queries"):
        build(replace(config, retain=(*config.retain, str(other)), out=config.out.parent / "new"))


def test_a_part_is_found_again_and_another_part_refused(config: BuildConfig) -> None:
    first = replace(config, part=Part(number=1, count=3))
    assert build(first).computed_rows == 10
    assert build(first).hit
    with pytest.raises(MismatchError, match="not the same set"):
        build(replace(config, part=Part(number=2, count=3)))


def test_missing_doubled_and_foreign_parts_are_refused(config: BuildConfig) -> None:
    folders = build_parts(config, 3)
    out = config.out.parent / "joined"
    with pytest.raises(MismatchError, match=r"1 of 3 parts missing \(2/3\).*--shards 2/3"):
        merge([str(folders[0]), str(folders[2])], out)
    with pytest.raises(MismatchError, match=r"part-1: part 1/3, as .*part-1 is; give it once"):
        merge([str(folders[0]), str(folders[0])], out)
    build(config)
    with pytest.raises(MismatchError, match="not a part of the set"):
        merge([str(folders[0]), str(config.out)], out)
    assert not out.exists()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_of_a_slurm_array(config: BuildConfig) -> None:
    words: list[object] = ["build", "--teacher", config.teacher, "--forget", config.forget[0]]
    words += ["--retain", config.retain[0], "--prefix", config.prefix]
    words += ["--engine", "transformers", "--top-k", 8, "--engine-arg", "batch-rows=3", "--json"]
    folders = [config.out.parent / f"p{number}" for number in (1, 2)]
    for number, folder in enumerate(folders, start=1):
        result = invoke(*words, "--out", folder, "--shards", f"{number}/2")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["rows"] == 15
    result = invoke("merge", *folders, "--out", config.out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 30
    engines = CacheReader.open(config.out).manifest.engines
    assert all(engine["options"] == {"batch_rows": 3} for engine in engines)
    result = invoke(*words, "--out", config.out, "--shards", "0/6")
    assert result.exit_code == 2
    assert "eight of them are 1/8 to 8/8; for a Slurm array that is --array=1-8" in result.stderr
