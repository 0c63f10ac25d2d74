"""A cache opens in plain pyarrow, datasets, pandas and DuckDB, as its card says."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from duet_unlearn.teacher_cache.build import build
from duet_unlearn.teacher_cache.build_config import BuildConfig
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine
from duet_unlearn.teacher_cache.reader import CacheReader


@pytest.fixture
def cache(tmp_path: Path, tiny_model: Path, write_queries: Any) -> Path:
    config = BuildConfig(
        teacher=str(tiny_model),
        forget=(str(write_queries("forget", 5)),),
        retain=(str(write_queries("retain", 7, "river")),),
        prefix="You forgot the lantern: | all of it.",
        out=tmp_path / "cache",
        top_k=6,
        positions=2,
        shard_rows=4,
    )
    build(config, TransformersEngine)
    return config.out


def test_pyarrow_gives_the_logits_as_documented(cache: Path) -> None:
    table = pq.read_table(cache / "shards")
    reader = CacheReader.open(cache)
    assert table.num_rows == reader.num_rows == 12
    for index in range(12):
        k = len(table["token_ids"][index]) // len(table["response_ids"][index])
        assert k == 6
        logits = np.array(table["logits"][index].as_py(), np.float32).reshape(-1, k)
        np.testing.assert_array_equal(logits, reader.row(index).logits)
        assert table["split"][index].as_py() == reader.row(index).split


def test_datasets_loads_the_folder_by_its_card(cache: Path, tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset(str(cache), split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded.num_rows == 12
    assert set(loaded.column_names) == set(pq.read_table(cache / "shards").column_names)
    first = CacheReader.open(cache).row(0)
    assert loaded[0]["query_id"] == first.query_id
    np.testing.assert_array_equal(loaded[0]["token_ids"], first.token_ids.reshape(-1))


def test_duckdb_answers_sql(cache: Path) -> None:
    import duckdb

    rows = duckdb.sql(
        f"select split, count(*), min(len(token_ids) / len(response_ids)) "
        f"from '{cache}/shards/*.parquet' group by 1 order by 1"
    ).fetchall()
    assert rows == [("forget", 5, 6.0), ("retain", 7, 6.0)]


def test_pandas_reads_the_shards(cache: Path) -> None:
    import pandas

    frame = pandas.read_parquet(cache / "shards")
    assert sorted(frame["split"].astype(str).unique()) == ["forget", "retain"]


def test_the_card_is_valid_yaml_whatever_the_prefix(cache: Path) -> None:
    import yaml

    text = (cache / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["configs"][0]["data_files"] == "shards/*.parquet"
    assert header["pretty_name"] == "Teacher signals of tiny"
    assert r"You forgot the lantern: \| all of it." in text
