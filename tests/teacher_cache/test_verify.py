"""`verify` names every kind of damage; each case is made on a copy of one sound cache."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duet_unlearn.data.models.fingerprint import sha256_file, sha256_json
from duet_unlearn.errors import CorruptCacheError
from duet_unlearn.teacher_cache import verify as verify_module
from duet_unlearn.teacher_cache.format.card import write_card
from duet_unlearn.teacher_cache.format.manifest import ShardEntry, parse_manifest, read_manifest
from duet_unlearn.teacher_cache.inspect import render_summary, summarize
from duet_unlearn.teacher_cache.verify import verify


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> Path:
    """A sound cache of two shards with five rows each."""
    folder = tmp_path_factory.mktemp("sound") / "cache"
    sizes = {"vocab_size": 90, "top_k": 4, "logit_dtype": "float16"}
    return make_cache(folder, shards=2, shard_rows=5, **sizes)


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "cache"))


def _shard(cache: Path, index: int = 1) -> Path:
    return cache / "shards" / f"0000{index}-of-00002.parquet"


def _list_in_manifest(cache: Path) -> None:
    """Make the manifest agree with the shards' bytes, as a careful forger would."""
    path = cache / "manifest.json"
    value = json.loads(path.read_text())
    for index, entry in enumerate(value["shards"]):
        entry["bytes"] = _shard(cache, index).stat().st_size
        entry["sha256"] = sha256_file(_shard(cache, index))
    del value["digest"]
    path.write_text(json.dumps({**value, "digest": sha256_json(value)}))


def _rewrite(cache: Path, column: str, change: Callable[[list[Any]], None]) -> None:
    table = pq.read_table(_shard(cache))
    values = table[column].to_pylist()
    change(values)
    place = table.schema.get_field_index(column)
    array = pa.array(values, table.schema.field(column).type)
    pq.write_table(table.set_column(place, column, array), _shard(cache))
    _list_in_manifest(cache)


def test_a_sound_cache_has_no_problems(cache: Path) -> None:
    report = verify(cache)
    assert report.problems == ()
    assert report.rows == 10


def test_no_text_is_held_beyond_its_shard(
    cache_of_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [chr(ord("a") + number) * 400_000 for number in range(20)]
    rows = [(f"q{n}", "train", text) for n, text in enumerate(texts)]
    cache = cache_of_rows("long", rows, scored="assistant")
    held: list[int] = []

    def note(*_: object) -> None:
        held.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(verify_module, "ensure_sound", note)
    tracemalloc.start()
    try:
        report = verify(cache)
    finally:
        tracemalloc.stop()

    assert (report.problems, report.rows, len(held)) == ((), 20, 5)
    assert max(held[1:]) - min(held[1:]) < len(texts[0])


def test_a_shard_is_known_by_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = read_manifest(cache).shards
    assert [entry.index for entry in entries] == [0, 1]

    # A search of the list for each shard would take the square of their number.
    def compared(*_: object) -> bool:
        raise AssertionError

    monkeypatch.setattr(ShardEntry, "__eq__", compared)
    assert verify(cache).problems == ()


def _flip_a_byte(cache: Path) -> None:
    data = bytearray(_shard(cache).read_bytes())
    data[len(data) // 2] ^= 0x01
    _shard(cache).write_bytes(data)


def _swap(cache: Path) -> None:
    one, two = _shard(cache, 0).read_bytes(), _shard(cache, 1).read_bytes()
    _shard(cache, 0).write_bytes(two)
    _shard(cache, 1).write_bytes(one)
    _list_in_manifest(cache)


def _drop_a_position(values: list[Any]) -> None:
    values[0] = values[0][:-1]


def _repeat_id(values: list[Any]) -> None:
    values[0][1] = values[0][0]


def _set(values: list[Any], row: int, place: int, value: object) -> None:
    values[row][place] = value


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_byte, "its bytes have sha256:"),
        (lambda c: _shard(c).write_bytes(_shard(c).read_bytes()[:-9]), "bytes, the manifest says"),
        (lambda c: _shard(c).unlink(), "the shard is missing"),
        (_swap, "shards were swapped"),
        (lambda c: (c / "shards" / "more.parquet").touch(), "not listed in the manifest"),
        (
            lambda c: _rewrite(c, "token_ids", lambda v: _set(v, 0, 0, 90)),
            "token_ids outside the vocabulary of 90",
        ),
        (
            lambda c: _rewrite(c, "token_ids", lambda v: _set(v, 0, 0, -1)),
            "token_ids outside the vocabulary of 90",
        ),
        (lambda c: _rewrite(c, "token_ids", _repeat_id), "a token id twice at one position"),
        (lambda c: _rewrite(c, "logits", lambda v: _set(v, 2, 3, 99.0)), "not in descending order"),
        (lambda c: _rewrite(c, "logits", lambda v: _set(v, 2, 0, np.inf)), "not finite"),
        (lambda c: _rewrite(c, "logits", _drop_a_position), "rows are not T*K long"),
        (
            lambda c: _rewrite(c, "logsumexp", lambda v: _set(v, 0, 1, -50.0)),
            "a logsumexp below the largest logit",
        ),
        (
            lambda c: _rewrite(c, "query", lambda v: v.__setitem__(0, "another")),
            "its queries are not those that the manifest names",
        ),
        (
            lambda c: _rewrite(c, "split", lambda v: v.__setitem__(0, "retain")),
            "1 forget and 4 retain rows in its order, the manifest says 2 and then 3",
        ),
        (
            lambda c: _rewrite(c, "query_id", lambda v: v.__setitem__(0, None)),
            "empty values in query_id",
        ),
    ],
)
def test_damage_is_found_and_its_shard_is_named(
    cache: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(cache)
    problems = verify(cache).problems
    assert problems
    assert any(message in problem for problem in problems), problems
    whole = "its queries" in message
    assert whole or any(".parquet" in problem for problem in problems)


def test_a_cache_that_this_machine_has_checked_once_is_held_to_the_rules_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "ensure_sound", lambda *_: None)

    def repeat(values: list[Any]) -> None:
        values[0][1] = values[0][0]

    _rewrite(cache, "token_ids", repeat)
    assert any("a token id twice" in problem for problem in verify(cache).problems)


def test_what_a_stopped_push_left_is_no_part_of_a_cache(cache: Path) -> None:
    (cache / "shards" / ".00000-of-00002.parquet.ab12.tmp").write_bytes(b"half")
    assert verify(cache).problems == ()


def test_all_bad_shards_are_named(cache: Path) -> None:
    for index in range(2):
        _shard(cache, index).write_bytes(b"PAR1")
    assert len(verify(cache).problems) == 2


def test_a_shard_of_another_recipe_is_named_with_what_differs(cache: Path) -> None:
    table = pq.read_table(_shard(cache))
    metadata = dict(table.schema.metadata)
    recipe = {**json.loads(metadata[b"duet.recipe"]), "prefix": "Forget all."}
    metadata[b"duet.recipe"] = json.dumps(recipe).encode()
    metadata[b"duet.recipe_id"] = sha256_json(recipe).encode()
    pq.write_table(table.replace_schema_metadata(metadata), _shard(cache))
    _list_in_manifest(cache)
    (problem,) = verify(cache).problems
    assert 'a shard of another recipe (prefix: "Forget." / "Forget all.")' in problem


def test_sums_that_are_not_those_of_the_rows_are_named(cache: Path) -> None:
    table = pq.read_table(_shard(cache))
    metadata = dict(table.schema.metadata)
    sums = json.loads(metadata[b"duet.statistics"])
    sums["retain"]["mass"] *= 1.1
    metadata[b"duet.statistics"] = json.dumps(sums).encode()
    pq.write_table(table.replace_schema_metadata(metadata), _shard(cache))
    _list_in_manifest(cache)
    (problem,) = verify(cache).problems
    assert "00001-of-00002.parquet: its sums over retain rows (3 rows, 6 positions, mass" in problem


@pytest.mark.parametrize(("entry", "factor"), [("entropy", 0.5), ("positions", 2)])
def test_totals_that_are_not_those_of_the_shards_are_named(
    cache: Path, entry: str, factor: float
) -> None:
    path = cache / "manifest.json"
    value = json.loads(path.read_text())
    value["splits"]["forget"][entry] = type(value["splits"]["forget"][entry])(
        value["splits"]["forget"][entry] * factor
    )
    del value["digest"]
    path.write_text(json.dumps({**value, "digest": sha256_json(value)}))
    (problem,) = verify(cache).problems
    assert "forget has 4 rows, 8 positions, mass" in problem
    assert "the manifest says 4 rows" in problem


def test_a_query_that_stands_twice_is_named(cache: Path) -> None:
    _rewrite(cache, "query_id", lambda v: v.__setitem__(1, v[0]))
    assert any("a query stands in it twice" in problem for problem in verify(cache).problems)


def test_an_edited_manifest_is_refused(cache: Path) -> None:
    path = cache / "manifest.json"
    path.write_text(path.read_text().replace('"teacher": "tiny"', '"teacher": "u"'))
    with pytest.raises(CorruptCacheError, match="edited or damaged"):
        verify(cache)


def test_numbers_of_the_teachers_check_are_shown(sound: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(sound, tmp_path / "cache"))
    manifest = replace(read_manifest(cache), check={"forget recall": 12.5, "note": "a | b"})
    manifest = manifest.write(cache)
    write_card(cache, manifest)
    assert read_manifest(cache).check == manifest.check
    assert "| forget recall | 12.5 |" in (cache / "README.md").read_text()
    assert "forget recall" in render_summary(summarize(cache))
    value = json.loads((cache / "manifest.json").read_text())
    for bad in ([1], {"a": {"b": 1}}, {"a": "x" * 5000}, {str(i): i for i in range(100)}):
        with pytest.raises(CorruptCacheError, match="check: expected"):
            parse_manifest({**value, "check": bad, "digest": _digest({**value, "check": bad})})


def _digest(value: dict[str, object]) -> str:
    return sha256_json({k: v for k, v in value.items() if k != "digest"})
