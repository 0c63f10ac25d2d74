"""Joining caches of one recipe: each query once, no teacher, nothing mixed."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from duet_unlearn.errors import ConfigurationError, MismatchError, StoppedError
from duet_unlearn.teacher_cache.build import row_source
from duet_unlearn.teacher_cache.build.assemble import Assembly
from duet_unlearn.teacher_cache.format.manifest import read_manifest
from duet_unlearn.teacher_cache.format.row_group import RowGroup
from duet_unlearn.teacher_cache.format.shard import ShardFile
from duet_unlearn.teacher_cache.merge import merge
from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader
from duet_unlearn.teacher_cache.verify import verify

MakeCache = Callable[..., Path]


def numbered(first: int, stop: int, ids: str = "q") -> list[tuple[str, str, str]]:
    return [
        (f"{ids}{i}", "forget" if i % 3 == 0 else "retain", f"query {i}")
        for i in range(first, stop)
    ]


def by_text(cache: Path) -> dict[tuple[str, str], CachedRow]:
    reader = CacheReader.open(cache)
    rows = [reader.row(i) for i in range(reader.num_rows)]
    assert len({(row.split, row.query) for row in rows}) == len(rows)
    return {(row.split, row.query): row for row in rows}


@pytest.fixture
def project_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The project's log, whatever an earlier command did to its handlers."""
    logger = logging.getLogger("duet_unlearn")
    logger.propagate = True
    caplog.set_level(logging.INFO, logger="duet_unlearn")
    return caplog


def test_of_many_caches_one_at_a_time_is_held(cache_of_rows: MakeCache) -> None:
    caches = [cache_of_rows(f"c{n}", numbered(n * 12, n * 12 + 12)) for n in range(4)]
    readers = row_source.open_caches([str(cache) for cache in caches])
    source = row_source.RowSource(readers)

    def held(kind: type) -> int:
        gc.collect()
        return sum(isinstance(found, kind) for found in gc.get_objects())

    files, groups = held(ShardFile), held(RowGroup)
    places = [place for place, _ in source.scan()]
    assert held(ShardFile) - files == 3  # the shards of one cache

    assert len(source.fetch(places)) == 48
    source.engines(places[-12:])
    assert held(ShardFile) - files == 3
    assert held(RowGroup) - groups == 4 + 2  # the last of each, and all three of one cache


def test_a_merge_holds_every_query_once_with_its_own_signal(
    tmp_path: Path, cache_of_rows: MakeCache
) -> None:
    a = cache_of_rows("a", numbered(0, 10), engine="one")
    b = cache_of_rows("b", numbered(6, 25), engine="two")
    result = merge([str(a), str(b)], tmp_path / "out", shard_rows=7)
    assert (result.hit, result.repeated_rows, result.differing_rows) == (False, 4, 0)
    assert verify(tmp_path / "out").problems == ()
    merged = by_text(tmp_path / "out")
    assert {row.query_id for row in merged.values()} == {f"q{i}" for i in range(25)}
    for source in (a, b):
        for key, row in by_text(source).items():
            np.testing.assert_array_equal(merged[key].token_ids, row.token_ids)
            np.testing.assert_array_equal(merged[key].logits, row.logits)
            np.testing.assert_array_equal(merged[key].logsumexp, row.logsumexp)
    manifest = result.manifest
    assert {engine["engine"] for engine in manifest.engines} == {"one", "two"}
    assert [shard.num_rows for shard in manifest.shards] == [7, 7, 7, 4]
    # Decoded samples come from the sources: a merge has no tokenizer.
    assert [sample["query_id"] for sample in manifest.samples] == ["q0", "q6"]


def test_sums_of_a_merge_are_those_of_its_rows(tmp_path: Path, cache_of_rows: MakeCache) -> None:
    parts = [cache_of_rows(n, numbered(i, i + 5)) for n, i in (("a", 0), ("b", 5))]
    whole = CacheReader.open(cache_of_rows("whole", numbered(0, 10))).manifest
    merged = merge([str(part) for part in parts], tmp_path / "out").manifest
    assert merged.queries == whole.queries
    for split in ("forget", "retain"):
        assert merged.splits[split].mass == pytest.approx(whole.splits[split].mass, rel=1e-12)
        assert merged.splits[split].positions == whole.splits[split].positions


def test_the_same_merge_is_a_hit(tmp_path: Path, cache_of_rows: MakeCache) -> None:
    names = [str(cache_of_rows("a", numbered(0, 6))), str(cache_of_rows("b", numbered(6, 9)))]
    first = merge(names, tmp_path / "out")
    again = merge(list(reversed(names)), tmp_path / "out")
    assert again.hit
    assert again.manifest.digest == first.manifest.digest


def test_caches_of_other_recipes_are_refused_with_what_differs(
    tmp_path: Path, cache_of_rows: MakeCache
) -> None:
    a = cache_of_rows("a", numbered(0, 3))
    b = cache_of_rows("b", numbered(3, 6), prefix="Forget all.", positions=2)
    with pytest.raises(MismatchError, match=r'prefix: "Forget all\." / "Forget\."') as error:
        merge([str(a), str(b)], tmp_path / "out")
    assert "positions" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_digest_than_the_pinned_one_is_refused(
    tmp_path: Path, cache_of_rows: MakeCache
) -> None:
    a = cache_of_rows("a", numbered(0, 3))
    with pytest.raises(MismatchError, match="this cache has digest"):
        merge([f"{a}@sha256:{'0' * 64}"], tmp_path / "out")


def test_signals_that_differ_by_more_than_rounding_are_counted(
    tmp_path: Path, cache_of_rows: MakeCache, project_log: pytest.LogCaptureFixture
) -> None:
    a = cache_of_rows("a", numbered(0, 6))
    near = cache_of_rows("near", numbered(0, 6), shift=0.001)
    far = cache_of_rows("far", numbered(2, 8), shift=0.5)
    assert merge([str(a), str(near)], tmp_path / "one").differing_rows == 0
    result = merge([str(a), str(near), str(far)], tmp_path / "two")
    assert (result.repeated_rows, result.differing_rows) == (6 + 4, 4)
    assert "4 of 10 repeated queries have signals that differ by more than" in project_log.text
    # The first cache that has a query wins.
    kept, first = by_text(tmp_path / "two"), by_text(a)
    for key, row in first.items():
        np.testing.assert_array_equal(kept[key].logits, row.logits)


def test_an_id_that_stands_for_two_queries_is_replaced(
    tmp_path: Path, cache_of_rows: MakeCache, project_log: pytest.LogCaptureFixture
) -> None:
    a = cache_of_rows("a", [("1", "forget", "one"), ("2", "retain", "two")])
    b = cache_of_rows(
        "b", [("1", "forget", "another"), ("2", "retain", "two"), ("3", "retain", "x")]
    )
    result = merge([str(a), str(b)], tmp_path / "out")
    assert (result.repeated_rows, result.renamed_rows) == (1, 1)
    ids = {text: row.query_id for (_, text), row in by_text(tmp_path / "out").items()}
    assert ids["one"] == "1"
    assert ids["another"].startswith("q-")
    assert ids["x"] == "3"
    shown = {s["query"]: s["query_id"] for s in read_manifest(tmp_path / "out").samples}
    assert all(ids[text] == query_id for text, query_id in shown.items())
    assert shown["one"] == "1"
    assert "1 queries have an id that stands for another query" in project_log.text
    assert verify(tmp_path / "out").problems == ()


def test_a_stopped_merge_goes_on(
    tmp_path: Path, cache_of_rows: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(cache_of_rows("a", numbered(0, 20))), str(cache_of_rows("b", numbered(20, 30)))]
    write = Assembly.write
    written: list[int] = []

    def stop_at_the_third(self: Assembly, index: int, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, index, *rest)  # type: ignore[arg-type]
        written.append(index)

    monkeypatch.setattr(Assembly, "write", stop_at_the_third)
    with pytest.raises(StoppedError, match="2 of 6 shards are finished .* the same command again"):
        merge(names, tmp_path / "out", shard_rows=5)
    monkeypatch.undo()
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/shards").iterdir()}
    merge(names, tmp_path / "out", shard_rows=5)
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    assert verify(tmp_path / "out").problems == ()
    assert len(by_text(tmp_path / "out")) == 30


def test_windows_bound_what_is_held_and_change_nothing(
    tmp_path: Path, cache_of_rows: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ids of the second team sort the other way round: its rows are needed in another order.
    a = cache_of_rows("a", numbered(0, 30))
    b = cache_of_rows("b", [(f"z{99 - i}", "retain", f"other {i}") for i in range(30)])
    whole = by_text(_merged(tmp_path / "whole", a, b))
    monkeypatch.setattr(row_source, "WINDOW_BYTES", 5 * 4200)
    windows: list[int] = []
    fetch = row_source.RowSource.fetch

    def counted(
        self: row_source.RowSource, places: list[row_source.Place]
    ) -> dict[row_source.Place, row_source.CacheRow]:
        rows = fetch(self, places)
        windows.append(len(rows))
        return rows

    monkeypatch.setattr(row_source.RowSource, "fetch", counted)
    parts = by_text(_merged(tmp_path / "parts", a, b))
    assert len(windows) == 12
    assert max(windows) <= 5
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[key].logits, parts[key].logits) for key in whole)


def _merged(out: Path, *caches: Path) -> Path:
    merge([str(cache) for cache in caches], out, shard_rows=5)
    return out


def test_nothing_to_merge_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no caches"):
        merge([], tmp_path / "out")
