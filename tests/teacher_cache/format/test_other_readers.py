"""A cache opens in plain pyarrow, datasets, pandas and DuckDB, as its card says."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from duet_unlearn.data.models.fingerprint import sha256_file, sha256_json
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine
from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader
from duet_unlearn.teacher_cache.verify import verify


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


@pytest.mark.parametrize("logit_dtype", ["float16", "float32"])
def test_every_column_is_read_by_each_library(
    cache_of_rows: Callable[..., Path], logit_dtype: str
) -> None:
    import duckdb
    import pandas
    import polars

    rows = [(f"q{i}", "forget" if i < 4 else "retain", f"query {i}") for i in range(8)]
    cache = cache_of_rows("cache", rows, logit_dtype=logit_dtype)
    files = f"{cache}/shards/*.parquet"
    reader = CacheReader.open(cache)
    rows_by_id = sorted(map(reader.row, range(8)), key=lambda row: row.query_id)
    frames = {
        "duckdb": duckdb.sql(f"select * from '{files}' order by query_id").to_df(),
        "pandas": pandas.read_parquet(cache / "shards").sort_values("query_id"),
        "polars": polars.read_parquet(files).sort("query_id").to_pandas(),
    }
    for library, frame in frames.items():
        for index in range(8):
            row, found = rows_by_id[index], frame.iloc[index]
            assert (found["query_id"], found["split"]) == (row.query_id, row.split), library
            for name in ("prompt_ids", "response_ids", "token_ids", "logits", "logsumexp"):
                np.testing.assert_array_equal(
                    np.array(found[name], dtype=np.float32),
                    getattr(row, name).reshape(-1).astype(np.float32),
                    err_msg=f"{library} {name}",
                )


def test_the_queries_of_readme_and_card_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fenced block of SQL or Python that reads a cache, as it is printed."""
    import duckdb

    monkeypatch.chdir(tmp_path)
    (tmp_path / "hp-cache").symlink_to(cache)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    root = Path(__file__).parents[3]
    readme = (root / "README.md").read_text(encoding="utf-8")
    headings = ("## From Python", "## Read a cache from other code")
    section = "".join(readme.split(name)[1].split("\n## ")[0] for name in headings)
    card = (cache / "README.md").read_text(encoding="utf-8")
    blocks = [("readme", *block) for block in _fenced(section)]
    blocks += [("card", *block) for block in _fenced(card)]
    assert {language for _, language, _ in blocks} >= {"python"}
    for place, language, code in blocks:
        monkeypatch.chdir(tmp_path if place == "readme" else cache)
        if language == "python":
            exec(compile(code, place, "exec"), {})  # noqa: S102 - the very text we print
        elif language == "sql":
            assert duckdb.sql(code).fetchall()


def _fenced(text: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


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


def test_the_card_tells_digest_splits_and_the_tokens_of_a_sample(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    text = (cache / "README.md").read_text(encoding="utf-8")
    assert f"| digest | `{manifest['digest']}` |" in text
    assert "| queries | 5 forget + 7 retain |" in text
    rows = re.findall(
        r"^\| (forget|retain) \| (.+?) \| (`.+` 0\.\d\d(?:, .*)?) \|$", text, re.MULTILINE
    )
    assert {split for split, _, _ in rows} == {"forget", "retain"}
    token = manifest["samples"][0]["strongest"][0]
    shown = repr(token["text"])[1:-1].replace("`", "'").replace("|", "\\|")
    assert f"`{shown}` {token['probability']:.2f}" in rows[0][2]


def _list_as_they_are(cache: Path) -> None:
    """Make the manifest name the bytes of the shards as they are now."""
    value = json.loads((cache / "manifest.json").read_text())
    for entry in value["shards"]:
        path = cache / "shards" / entry["name"]
        entry.update(bytes=path.stat().st_size, sha256=sha256_file(path))
    del value["digest"]
    (cache / "manifest.json").write_text(json.dumps({**value, "digest": sha256_json(value)}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compression": "none", "use_dictionary": False},
        {"compression": "gzip", "data_page_version": "2.0", "write_page_index": True},
        {"compression": "lz4", "use_compliant_nested_type": False, "write_statistics": False},
        {"compression": "brotli", "version": "1.0", "write_page_checksum": True},
    ],
    ids=str,
)
def test_shards_that_pyarrow_wrote_anew_are_read(cache: Path, settings: dict[str, Any]) -> None:
    expected = [CacheReader.open(cache).row(i) for i in range(12)]
    for path in (cache / "shards").iterdir():
        pq.write_table(pq.read_table(path), path, **settings)
    _list_as_they_are(cache)
    assert verify(cache).problems == ()
    _assert_rows(CacheReader.open(cache), expected)


def test_shards_that_duckdb_wrote_anew_are_read(
    tmp_path: Path, cache_of_rows: Callable[..., Path]
) -> None:
    """DuckDB has no float16, so this is a cache in float32."""
    import duckdb

    rows = [(f"q{i}", "forget" if i < 4 else "retain", f"query {i} ü") for i in range(8)]
    cache = cache_of_rows("cache", rows, logit_dtype="float32")
    expected = [CacheReader.open(cache).row(i) for i in range(8)]
    for path in (cache / "shards").iterdir():
        metadata = pq.read_schema(path).metadata
        pairs = ", ".join(
            f"'{key.decode()}': '{value.decode()}'" for key, value in metadata.items()
        )
        new = tmp_path / "new.parquet"
        duckdb.sql(f"copy '{path}' to '{new}' (format parquet, kv_metadata {{{pairs}}})")
        new.replace(path)
    _list_as_they_are(cache)
    assert verify(cache).problems == ()
    _assert_rows(CacheReader.open(cache), expected)


def _assert_rows(reader: CacheReader, expected: list[CachedRow]) -> None:
    for index, row in enumerate(expected):
        found = reader.row(index)
        assert (found.query_id, found.split, found.query) == (row.query_id, row.split, row.query)
        for name in ("prompt_ids", "response_ids", "token_ids", "logits", "logsumexp"):
            np.testing.assert_array_equal(getattr(found, name), getattr(row, name))
