"""Format version 1: what is written comes back, by us and by readers that know nothing of us."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from duet_unlearn.data.models.fingerprint import sha256_json
from duet_unlearn.errors import (
    CacheError,
    ConfigurationError,
    CorruptCacheError,
    MismatchError,
)
from duet_unlearn.teacher_cache.format.manifest import Manifest, read_manifest, split_pin
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import CacheRow
from duet_unlearn.teacher_cache.format.shard import ShardFile, ShardHeader, write_shard
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.format.statistics import rows_statistics, signal_statistics
from duet_unlearn.teacher_cache.reader import CacheReader

SHA = "sha256:" + "ab" * 32


def make_recipe(**changes: object) -> Recipe:
    values: dict[str, object] = {
        "weights": SHA,
        "config": SHA,
        "tokenizer": SHA,
        "vocabulary": SHA,
        "vocab_size": 50,
        "chat_template": None,
        "template_date": "2024-07-26",
        "prefix": "Forget it.",
        "prefix_place": "raw",
        "retain_prefix": True,
        "top_k": 3,
        "positions": 2,
        "logit_dtype": "float32",
        "compute_dtype": "float32",
        "eos_token_ids": (1,),
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def make_row(
    number: int, split: str = "forget", *, positions: int = 2, **signal: object
) -> CacheRow:
    rng = np.random.default_rng(number)
    logits = -np.sort(-rng.normal(0, 3, (positions, 3)).astype(np.float32), axis=1)
    values: dict[str, object] = {
        "response_ids": np.array([7, 8][2 - positions :], np.int32) if positions == 2 else [1],
        "token_ids": np.stack([rng.choice(50, 3, replace=False) for _ in range(positions)]),
        "logits": logits,
        "logsumexp": np.log(np.exp(logits).sum(axis=1)) + np.float32(0.5),
    }
    values.update(signal)
    dtypes = {"logits": np.float32, "logsumexp": np.float32}
    arrays = {k: np.asarray(v).astype(dtypes.get(k, np.int32)) for k, v in values.items()}
    return CacheRow(
        query_id=f"q{number}",
        split=split,
        query=f"Что такое {number}?",
        prompt_ids=np.arange(number % 4 + 1, dtype=np.int32),
        signal=Signal(**arrays),
    )


def write_cache(folder: Path, rows: list[CacheRow], recipe: Recipe) -> Manifest:
    """Write a one-shard cache without an engine, to test the format alone."""
    (folder / "shards").mkdir(parents=True)
    header = ShardHeader(recipe=recipe, queries=SHA, index=0, count=1, engines=({"name": "test"},))
    entry = write_shard(folder, rows, header)
    return Manifest(
        recipe=recipe,
        teacher="tiny",
        queries=SHA,
        engines=({"name": "test"},),
        shards=(entry,),
        splits=rows_statistics(rows),
        samples=(),
    ).write(folder)


@pytest.mark.parametrize("logit_dtype", ["float16", "float32"])
def test_rows_come_back_as_they_were_written(tmp_path: Path, logit_dtype: str) -> None:
    rows = [make_row(0), make_row(1, positions=1), make_row(2, "retain")]
    write_cache(tmp_path, rows, make_recipe(logit_dtype=logit_dtype))
    reader = CacheReader.open(tmp_path)
    assert reader.num_rows == 3
    assert reader.splits.tolist() == [0, 0, 1]
    for index, expected in enumerate(rows):
        found = reader.row(index)
        stored = expected.signal.logits.astype(logit_dtype).astype(np.float32)
        assert (found.query_id, found.split, found.query) == (
            expected.query_id,
            expected.split,
            expected.query,
        )
        assert found.logits.dtype == np.float32
        np.testing.assert_array_equal(found.prompt_ids, expected.prompt_ids)
        np.testing.assert_array_equal(found.response_ids, expected.signal.response_ids)
        np.testing.assert_array_equal(found.token_ids, expected.signal.token_ids)
        np.testing.assert_array_equal(found.logits, stored)
        np.testing.assert_array_equal(found.logsumexp, expected.signal.logsumexp)


def test_plain_pyarrow_reads_the_documented_columns_and_types(tmp_path: Path) -> None:
    write_cache(tmp_path, [make_row(0)], make_recipe(logit_dtype="float16"))
    table = pq.read_table(tmp_path / "shards" / "00000-of-00001.parquet")
    assert table.column_names == [
        "query_id",
        "split",
        "query",
        "prompt_ids",
        "response_ids",
        "token_ids",
        "logits",
        "logsumexp",
    ]
    assert str(table.schema.field("split").type).startswith("dictionary<values=string")
    assert str(table.schema.field("token_ids").type) == "list<element: int32 not null>"
    assert str(table.schema.field("logits").type) == "list<element: halffloat not null>"
    assert str(table.schema.field("logsumexp").type) == "list<element: float not null>"
    metadata = table.schema.metadata
    assert metadata[b"duet.format_version"] == b"1"
    assert metadata[b"duet.recipe_id"].decode() == make_recipe(logit_dtype="float16").recipe_id
    assert metadata[b"duet.shard_index"] == b"0"


def test_statistics_are_those_worked_out_by_hand() -> None:
    # Probabilities 1/2 and 1/4 in the Top-2, 1/4 beyond: entropy 1.5 bits.
    logits = np.log(np.array([[0.5, 0.25]], np.float32))
    mass, entropy = signal_statistics(logits, np.zeros(1, np.float32))
    assert mass[0] == pytest.approx(0.75, abs=1e-6)
    assert entropy[0] == pytest.approx(1.5 * np.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [[3, 2, np.nan], [3, 2, 1]]}, "not finite"),
        ({"token_ids": [[1, 2, 50], [1, 2, 3]]}, "outside the vocabulary of 50"),
        ({"token_ids": [[1, 2], [1, 2]]}, r"token ids \(2, 2\)"),
        ({"logits": [[70000, 2, 1], [3, 2, 1]]}, "--logit-dtype float32"),
        ({"logsumexp": [1.0]}, "positions"),
    ],
)
def test_a_signal_that_breaks_the_format_is_never_written(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(CacheError, match=message):
        write_cache(tmp_path, [make_row(0, **change)], make_recipe(logit_dtype="float16"))
    assert not list((tmp_path / "shards").iterdir())


def test_an_early_end_needs_an_end_of_sequence_token(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="without an end-of-sequence token"):
        write_cache(tmp_path, [make_row(0, positions=1, response_ids=[9])], make_recipe())


def test_the_recipe_id_depends_on_every_entry() -> None:
    base = make_recipe()
    changes: list[dict[str, object]] = [
        {"weights": "sha256:" + "cd" * 32},
        {"prefix": "Forget that."},
        {"prefix_place": "user"},
        {"retain_prefix": False},
        {"top_k": 4},
        {"positions": 3},
        {"logit_dtype": "float16"},
        {"compute_dtype": "bfloat16"},
        {"eos_token_ids": (1, 2)},
        {"template_date": "2024-07-27"},
        {"chat_template": SHA},
        {"vocab_size": 51},
    ]
    ids = {make_recipe(**change).recipe_id for change in changes}
    assert len(ids) == len(changes)
    assert base.recipe_id not in ids
    assert Recipe.from_json(base.to_json()) == base
    assert base.differences(make_recipe(top_k=4)) == ["top_k: 3 / 4"]


def test_a_recipe_asks_for_no_more_tokens_than_there_are() -> None:
    with pytest.raises(ConfigurationError, match="top_k is 51, but .* has 50 tokens"):
        make_recipe(top_k=51)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, [make_row(0)], make_recipe())
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("Forget it.", "Forget me."))
    with pytest.raises(CorruptCacheError, match="edited or damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not the manifest of a teacher cache"),
        (
            '{"format": "duet-teacher-cache", "format_version": 4}',
            "version 4, expected 1 or 2 or 3",
        ),
        ('{"format": "duet-teacher-cache", "format_version": 1}', "entries missing or unknown"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_broken_manifest_is_one_of_our_errors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CorruptCacheError, match=message):
        read_manifest(tmp_path)


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    manifest = write_cache(tmp_path, [make_row(0)], make_recipe())
    value = manifest.to_json()
    value["shards"][0]["name"] = "../../etc/passwd"
    del value["digest"]
    value["digest"] = sha256_json(value)
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(CorruptCacheError, match="00000-of-00001.parquet"):
        read_manifest(tmp_path)


def test_a_pin_names_one_cache(tmp_path: Path) -> None:
    manifest = write_cache(tmp_path, [make_row(0)], make_recipe())
    assert CacheReader.open(f"{tmp_path}@{manifest.digest}").num_rows == 1
    with pytest.raises(MismatchError, match="this cache has digest"):
        CacheReader.open(f"{tmp_path}@sha256:{'0' * 64}")
    with pytest.raises(CacheError, match="64 hex digits"):
        split_pin(f"{tmp_path}@sha256:123")


def test_absent_unfinished_and_foreign_folders_each_get_their_line(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such folder"):
        CacheReader.open(tmp_path / "nowhere")
    (tmp_path / "shards").mkdir()
    with pytest.raises(CacheError, match="unfinished"):
        CacheReader.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="a file, expected a cache folder"):
        CacheReader.open(tmp_path / "file")


def test_a_shard_of_another_recipe_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "a", [make_row(0)], make_recipe())
    write_cache(tmp_path / "b", [make_row(0)], make_recipe(prefix="Forget him."))
    name = "shards/00000-of-00001.parquet"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(CorruptCacheError):
        CacheReader.open(tmp_path / "a").row(0)


def test_many_row_groups_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # three rows a group
    monkeypatch.setattr("duet_unlearn.teacher_cache.format.schema.ROW_GROUP_LOGITS", 18)
    rows = [make_row(i, "forget" if i < 7 else "retain") for i in range(20)]
    write_cache(tmp_path, rows, make_recipe())
    shard = ShardFile(tmp_path / "shards" / "00000-of-00001.parquet")
    assert shard.row_group_sizes == [3, 3, 3, 3, 3, 3, 2]
    reader = CacheReader.open(tmp_path)
    assert [len(group) for group in reader.row_groups] == [3, 3, 3, 3, 3, 3, 2]
    assert [reader.row(i).query_id for i in reversed(range(20))] == [
        f"q{i}" for i in reversed(range(20))
    ]
