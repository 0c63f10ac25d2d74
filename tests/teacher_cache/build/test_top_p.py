"""Positions with as many tokens as hold a share of the mass: what is kept, stored and refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duet_unlearn.data import demo_world as world
from duet_unlearn.errors import CacheError, ConfigurationError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.plan import Part
from duet_unlearn.teacher_cache.diff import diff
from duet_unlearn.teacher_cache.format.signal import Signal, keep_mass
from duet_unlearn.teacher_cache.inspect import render_summary, summarize
from duet_unlearn.teacher_cache.merge import merge
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify

K, P = 20, 0.9


def test_the_fewest_tokens_that_hold_the_mass_stay() -> None:
    masses = np.array([[0.5, 0.25, 0.125, 0.0625], [0.95, 0.02, 0.01, 0.01], [0.1] * 4])
    signal = Signal(
        response_ids=np.arange(3, dtype=np.int32),
        token_ids=np.arange(12, dtype=np.int32).reshape(3, 4),
        logits=np.log(masses).astype(np.float32) + 3,
        logsumexp=np.full(3, 3, np.float32),
    )
    for top_p, counts in ((0.7, [2, 1, 4]), (0.76, [3, 1, 4]), (0.96, [4, 2, 4]), (1e-9, [1] * 3)):
        kept = keep_mass(signal, top_p)
        assert (kept.logits > -np.inf).sum(axis=1).tolist() == counts
        for t, count in enumerate(counts):
            np.testing.assert_array_equal(kept.token_ids[t, :count], signal.token_ids[t, :count])
            np.testing.assert_array_equal(kept.logits[t, :count], signal.logits[t, :count])
            assert set(kept.token_ids[t, count:]) <= {signal.token_ids[t, 0]}


def make(out: Path, **changes: Any) -> CacheReader:
    queries = out.parent / "queries.jsonl"
    queries.write_text("\n".join(world.RETAIN.read_text().splitlines()[:12]) + "\n")
    settings: dict[str, Any] = {
        "teacher": str(world.MODEL),
        "prefix": None,
        "train": (str(queries),),
        "engine": "transformers",
        "top_k": K,
        "top_p": P,
        "positions": 6,
        "temperature": 2.0,
        "shard_rows": 5,
        "out": out,
    }
    build(BuildConfig(**{**settings, **changes}))
    return CacheReader.open(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ragged")
    make(folder / "cache")
    return folder


@pytest.mark.parametrize("logit_dtype", ["float16", "float32"])
def test_rows_are_those_of_the_whole_cache_cut_by_their_mass(
    folder: Path, tmp_path: Path, logit_dtype: str
) -> None:
    whole = make(tmp_path / "whole", top_p=1.0, logit_dtype="float32")
    cut = make(tmp_path / "cut", logit_dtype=logit_dtype)

    assert verify(tmp_path / "cut").problems == ()
    counts = []
    for ours, theirs in zip(cut, whole, strict=True):
        assert (ours.query_id, ours.query) == (theirs.query_id, theirs.query)
        np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
        mass = np.exp(theirs.logits - theirs.logsumexp[:, None]).cumsum(axis=1)
        for t in range(len(ours.response_ids)):
            count = min(K, int((mass[t] < P).sum()) + 1)
            counts.append(count)
            np.testing.assert_array_equal(ours.token_ids[t, :count], theirs.token_ids[t, :count])
            np.testing.assert_allclose(
                ours.logits[t, :count], theirs.logits[t, :count], rtol=1e-3, atol=1e-3
            )
            assert (ours.logits[t, count:] == -np.inf).all()
            assert (ours.token_ids[t, count:] == ours.token_ids[t, 0]).all()
    assert len(set(counts)) > 3
    # Any reader finds the positions of the flat lists by their counts.
    table = pq.read_table(tmp_path / "cut/shards")
    flat = table["counts"].combine_chunks().flatten().to_pylist()
    assert flat == counts
    assert len(table["token_ids"].combine_chunks().flatten()) == sum(counts)
    assert len(table["logits"].combine_chunks().flatten()) == sum(counts)
    assert cut.manifest.num_bytes < whole.manifest.num_bytes


def test_a_cache_of_ragged_rows_does_what_others_do(folder: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        make(tmp_path / f"part-{number}", part=Part(count=2, number=number))
    merged = merge([str(tmp_path / f"part-{n}") for n in (1, 2)], tmp_path / "merged").manifest
    assert diff(str(folder / "cache"), str(tmp_path / "merged"))["same"]
    assert verify(tmp_path / "merged").problems == ()
    cached = CacheReader.open(folder / "cache").manifest.splits["train"]
    assert merged.splits["train"].agrees_with(cached)
    twice = merge([str(folder / "cache"), str(tmp_path / "merged")], tmp_path / "twice")
    assert (twice.manifest.num_rows, twice.differing_rows) == (12, 0)

    config = {"reuse": (str(tmp_path / "merged"),)}
    again = make(tmp_path / "again", **config)
    for ours, theirs in zip(again, CacheReader.open(folder / "cache"), strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-2)

    summary = summarize(folder / "cache")
    assert summary["bytes_per_logit"] is None
    assert "hold 0.9 of the mass" in render_summary(summary)
    assert 0.5 < summary["splits"]["train"]["mean_top_k_mass"] <= 1
    assert (
        "| tokens per position | the fewest that hold 0.9 of the mass |"
        in (folder / "cache/README.md").read_text()
    )
    other = make(tmp_path / "other", top_p=0.5)
    assert diff(str(folder / "cache"), str(tmp_path / "other"))["recipe"] == ["top_p: 0.9 / 0.5"]
    assert other.manifest.recipe.version == 2


def lists(table: pa.Table, name: str) -> list[list[Any]]:
    return table[name].to_pylist()


def first_count(by: int) -> Callable[[pa.Table], dict[str, Any]]:
    def change(table: pa.Table) -> dict[str, Any]:
        counts = lists(table, "counts")
        counts[0][0] += by
        return {"counts": counts}

    return change


def movable(counts: list[int]) -> list[int]:
    return [t for t in range(len(counts) - 1) if counts[t] > 1 and counts[t + 1] < K]


def moved_border(table: pa.Table) -> dict[str, Any]:
    """Two positions whose counts still add up, with logits that no longer fall."""
    counts = lists(table, "counts")
    row, at = next((c, at) for c in counts for at in movable(c))
    row[at] -= 1
    row[at + 1] += 1
    return {"counts": counts}


def too_few(table: pa.Table) -> dict[str, Any]:
    """One token at each position, whatever mass it holds."""
    counts = lists(table, "counts")
    changed: dict[str, Any] = {"counts": [[1] * len(row) for row in counts]}
    for name in ("token_ids", "logits"):
        starts = [np.cumsum([0, *row[:-1]]) for row in counts]
        values = lists(table, name)
        changed[name] = [[v[i] for i in s] for v, s in zip(values, starts, strict=True)]
    return changed


def no_number(table: pa.Table) -> dict[str, Any]:
    logits = lists(table, "logits")
    logits[0][-1] = np.float16(-np.inf)
    return {"logits": logits}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_count(1), "rows are not T*K long"),
        (first_count(-1), "rows are not T*K long"),
        (first_count(K), "rows are not T*K long"),
        (first_count(-(1 << 30)), "rows are not T*K long"),
        (lambda table: {"counts": [[*row, 1] for row in lists(table, "counts")]}, "not T*K long"),
        (lambda table: {"counts": [[] for _ in lists(table, "counts")]}, "not T*K long"),
        (moved_border, "not in descending order"),
        (too_few, "fewer tokens at a position than hold 0.9 of its mass"),
        (no_number, "not finite"),
        (None, "other columns than"),
    ],
)
def test_counts_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, change: Callable[[pa.Table], dict[str, Any]] | None, message: str
) -> None:
    from duet_unlearn.teacher_cache.format.quarantine import find_problems

    tables = [pq.read_table(path) for path in (folder / "cache/shards").iterdir()]
    table = next(t for t in tables if any(map(movable, lists(t, "counts"))))
    path = tmp_path / "shard.parquet"
    if change is None:
        table = table.drop_columns(["counts"])
    else:
        for name, values in change(table).items():
            place, field = table.column_names.index(name), table.schema.field(name)
            table = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(table, path)

    [problem] = find_problems([path], CacheReader.open(folder / "cache").manifest.recipe)

    assert problem is not None
    assert message in problem


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.5])
def test_a_share_out_of_range_is_refused(tmp_path: Path, top_p: float) -> None:
    with pytest.raises(ConfigurationError, match="top_p"):
        make(tmp_path / "cache", top_p=top_p)


def test_an_engine_s_empty_places_are_not_stored(folder: Path) -> None:
    from dataclasses import replace

    from duet_unlearn.teacher_cache.format.shard import check_storable

    reader = CacheReader.open(folder / "cache")
    recipe, cached = reader.manifest.recipe, reader.row(0)
    from duet_unlearn.teacher_cache.build.row_source import RowSource

    row = RowSource([reader]).fetch([(0, 0)])[0, 0]
    check_storable(row, recipe)
    for logits in (np.full_like(cached.logits, -np.inf), np.full_like(cached.logits, np.nan)):
        with pytest.raises(CacheError, match="not finite"):
            check_storable(replace(row, signal=replace(row.signal, logits=logits)), recipe)
    hole = cached.logits.copy()
    hole[0, 0] = -np.inf
    with pytest.raises(CacheError, match="not finite"):
        check_storable(replace(row, signal=replace(row.signal, logits=hole)), recipe)
