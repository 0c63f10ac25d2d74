"""Caches made to hurt: each is refused before it costs memory, time or a crash."""

import json
import os
import subprocess
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
from duet_unlearn.errors import CacheError, ConfigurationError, CorruptCacheError
from duet_unlearn.teacher_cache.format import quarantine, schema
from duet_unlearn.teacher_cache.format.manifest import (
    MAX_MANIFEST_BYTES,
    decode_manifest,
    read_manifest,
    shard_name,
)
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import row_group_rows
from duet_unlearn.teacher_cache.format.shard import check_storable
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.format.strict_json import parse_json
from duet_unlearn.teacher_cache.merge import merge
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify

MakeCache = Callable[..., Path]

ROWS = [(f"q{i}", "forget" if i < 2 else "retain", f"query {i}") for i in range(4)]


@pytest.fixture
def cache(cache_of_rows: MakeCache) -> Path:
    """A sound cache of one shard with four rows."""
    return cache_of_rows("cache", ROWS)


def shard(cache: Path) -> Path:
    return cache / "shards" / "00000-of-00001.parquet"


def sign(cache: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Change the manifest and make its digest and the shard's hash fit, as a forger would."""
    value = json.loads((cache / "manifest.json").read_text())
    value["shards"][0].update(bytes=shard(cache).stat().st_size, sha256=sha256_file(shard(cache)))
    change(value)
    value.pop("digest")
    text = json.dumps({**value, "digest": sha256_json(value)})
    (cache / "manifest.json").write_text(text)


def put_column(cache: Path, name: str, column: pa.Array, **settings: Any) -> None:
    table = pq.read_table(shard(cache))
    place = table.schema.get_field_index(name)
    table = table.set_column(place, pa.field(name, column.type), column)
    pq.write_table(table, shard(cache), compression="zstd", **settings)
    sign(cache)


def equal_lists(rows: int, length: int) -> pa.Array:
    offsets = np.arange(rows + 1, dtype=np.int32) * length
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.full(rows * length, 7, "int32")))


def read_all(cache: Path) -> None:
    reader = CacheReader.open(cache)
    for index in range(reader.num_rows):
        reader.row(index)


def test_a_few_bytes_that_decode_to_millions_of_tokens_are_refused(cache: Path) -> None:
    put_column(cache, "prompt_ids", equal_lists(4, 10_000_000))
    assert shard(cache).stat().st_size < 20_000
    with pytest.raises(CorruptCacheError, match="40000000 values in a column, expected at most"):
        read_all(cache)


@pytest.mark.parametrize("claim", [4, 12])
def test_pages_larger_than_the_footer_says_are_refused(cache: Path, claim: int) -> None:
    """The Parquet library believes the page; see docs/decisions/0008."""
    count = 4 * 5_000_000
    put_column(cache, "prompt_ids", equal_lists(4, count // 4))
    data = shard(cache).read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    old = varint(2 * count)
    assert old in data[start:]
    forged = data[:start] + data[start:].replace(old, varint(2 * claim, pad=len(old)))
    shard(cache).write_bytes(forged)
    assert pq.ParquetFile(shard(cache)).metadata.row_group(0).column(3).num_values == claim
    sign(cache)
    with pytest.raises(CorruptCacheError, match="damaged shard .* expected length 4"):
        read_all(cache)
    assert any(shard(cache).name in problem for problem in verify(cache).problems)


def test_a_shard_that_hides_what_it_decodes_to_ends_the_childs_memory_only(cache: Path) -> None:
    put_column(cache, "query", pa.array(["z" * (100 << 20)] * 4), use_dictionary=False)
    data = shard(cache).read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    size = pq.ParquetFile(shard(cache)).metadata.row_group(0).column(2).total_uncompressed_size
    old = varint(2 * size)
    assert old in data[start:]
    forged = data[:start] + data[start:].replace(old, varint(80, pad=len(old)))
    shard(cache).write_bytes(forged)
    assert len(forged) < 50_000
    sign(cache)
    with pytest.raises(CorruptCacheError, match="decodes to more than the format allows"):
        CacheReader.open(cache)


def test_a_cache_is_tried_once_and_only_a_sound_one_is_remembered(
    cache: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    popen = subprocess.Popen

    def start(*arguments: Any, **settings: Any) -> Any:
        started.append(arguments)
        return popen(*arguments, **settings)

    monkeypatch.setattr(quarantine.subprocess, "Popen", start)
    for _ in range(2):
        read_all(cache)
    assert verify(cache).problems == ()
    assert len(started) == 1
    assert len(list(cache_home.rglob("verified/*/*"))) == 1
    put_column(cache, "query_id", pa.array(["a" * 4097, "b", "c", "d"]))
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match="a query_id of 4097 bytes"):
            CacheReader.open(cache)
    assert len(started) == 3
    assert len(list(cache_home.rglob("verified/*/*"))) == 1


def test_what_was_written_here_is_not_tried(
    tmp_path: Path, cache_home: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_cache(tmp_path / "made", shards=1)
    merge([str(made)], tmp_path / "merged")
    monkeypatch.setattr(quarantine.subprocess, "Popen", None)
    assert len(CacheReader.open(tmp_path / "merged")) == 40


def varint(number: int, pad: int = 0) -> bytes:
    out = bytearray()
    while number > 127 or len(out) + 1 < pad:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_a_text_repeated_for_every_row_is_not_unpacked(cache_of_rows: MakeCache) -> None:
    rows = [(f"q{i}", "retain", f"query {i}") for i in range(2000)]
    cache = cache_of_rows("many", rows, shard_rows=2000)
    # 2,000 rows of 8 MiB: 16 GB once unpacked, 8 MiB as a dictionary.
    text = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), ["z" * (8 << 20)])
    put_column(cache, "query", text, dictionary_pagesize_limit=1 << 30)
    with pytest.raises(CorruptCacheError, match="a query of 8388608 bytes, 16777216000 together"):
        read_all(cache)


def test_texts_in_delta_encoding_are_refused(cache: Path) -> None:
    put_column(
        cache,
        "query",
        pa.array(["z" * 1000] * 4),
        use_dictionary=False,
        column_encoding={"query": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(CorruptCacheError, match="DELTA_BYTE_ARRAY, which the format excludes"):
        read_all(cache)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("query_id", ["a" * 4097, "b", "c", "d"], "a query_id of 4097 bytes"),
        ("query", ["a" * ((1 << 24) + 1), "b", "c", "d"], r"16777\d+ bytes|damaged shard"),
        ("prompt_ids", [[], [1], [1], [1]], "a prompt that is empty"),
        ("split", ["forget", "forget", "retain", "other"], "split 'other'"),
    ],
)
def test_rows_beyond_the_limits_are_refused(
    cache: Path, column: str, values: list[Any], message: str
) -> None:
    kind = pa.list_(pa.int32()) if column == "prompt_ids" else pa.string()
    put_column(cache, column, pa.array(values, kind))
    with pytest.raises(CorruptCacheError, match=message):
        read_all(cache)


def test_text_that_is_not_utf8_is_refused(cache: Path) -> None:
    offsets = pa.py_buffer(np.arange(5, dtype=np.int32))
    bad = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"\xff" * 4)])
    put_column(cache, "query", bad)
    with pytest.raises(CorruptCacheError, match="UTF8"):
        read_all(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"forget": 1 << 40, "retain": 0}}, "rows in"),
        ({"rows": {"forget": -1, "retain": 5}}, "not a count"),
        ({"rows": {"forget": 2.0, "retain": 2}}, "not a count"),
        ({"row_group_rows": 1 << 20}, "expected groups of at most 16384 rows"),
        ({"row_group_rows": 0}, "expected groups of at most"),
        ({"bytes": True}, "not a count"),
        ({"sha256": "sha256:x"}, "64 hex digits"),
        ({"name": "../00000-of-00001.parquet"}, "expected '00000-of-00001.parquet'"),
        ({"more": 1}, "expected name, rows"),
    ],
)
def test_absurd_shard_entries_are_refused(
    cache: Path, change: dict[str, object], message: str
) -> None:
    sign(cache, lambda value: value["shards"][0].update(change))
    with pytest.raises(CorruptCacheError, match=message):
        CacheReader.open(cache)


def test_more_row_groups_than_bytes_could_describe_are_refused(cache: Path) -> None:
    def many_groups(value: dict[str, Any]) -> None:
        value["shards"][0].update(
            rows={"forget": 500_000, "retain": 500_000}, row_group_rows=1, bytes=1_000_000
        )

    sign(cache, many_groups)
    with pytest.raises(CorruptCacheError, match="and at least 256 bytes"):
        CacheReader.open(cache)


def test_rows_beyond_what_a_reader_holds_are_refused_before_they_are_counted(cache: Path) -> None:
    """The bytes that are claimed cost nothing where the shards are somewhere else."""
    claimed = {"bytes": 1 << 49, "row_group_rows": 1}

    def shard(rows: int) -> dict[str, Any]:
        return {**claimed, "rows": {"forget": rows // 2, "retain": rows - rows // 2}}

    sign(cache, lambda value: value["shards"][0].update(shard((1 << 31) - 1)))
    with pytest.raises(CorruptCacheError, match="rows in 562949953421312 bytes"):
        read_manifest(cache)
    sign(cache, lambda value: value["shards"][0].update(shard((1 << 14) + 1)))
    with pytest.raises(CorruptCacheError, match="expected at most 16384 groups"):
        read_manifest(cache)

    def many_shards(value: dict[str, Any]) -> None:
        names = (shard_name(index, 257) for index in range(257))
        value["shards"] = [{**value["shards"][0], **shard(1 << 14), "name": n} for n in names]

    sign(cache, many_shards)
    with pytest.raises(CorruptCacheError, match="in 4210688 row groups, expected at most"):
        read_manifest(cache)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("samples", [{"query_id": "q"}], "samples: expected"),
        ("samples", [1], "samples: expected a list of objects"),
        ("engines", {"engine": "x"}, "engines: expected a list"),
        ("teacher", 5, "teacher: expected text"),
        ("shards", [], "a list of at least one"),
        ("format_version", 1.5, "format version 1.5"),
        ("format_version", [], "format version"),
        ("format_version", 2, "format version 2, but its recipe is one of version 1"),
        ("recipe_id", f"sha256:{'0' * 64}", "recipe_id is not that of its recipe"),
        ("part", {"number": 2, "count": 1, "queries": f"sha256:{'0' * 64}"}, "2 of 1 is no part"),
    ],
)
def test_manifest_entries_of_the_wrong_kind_are_refused(
    cache: Path, name: str, value: object, message: str
) -> None:
    sign(cache, lambda manifest: manifest.update({name: value}))
    with pytest.raises(CorruptCacheError, match=message):
        read_manifest(cache)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "names a key twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "not a JSON number"),
        ("[1e999]", "too large"),
        ('["\\ud800"]', "surrogates not allowed"),
        ("[" * 200_000, "more values than its size"),
        (b"\xff\xfe", "can't decode"),
        ("9" * 5000, "limit"),
    ],
)
def test_json_with_more_than_one_reading_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_a_surrogate_pair_in_escapes_is_text() -> None:
    assert parse_json('["\\ud83d\\ude00"]') == ["\U0001f600"]


def test_splits_that_a_recipe_has_not_are_refused(cache: Path) -> None:
    sign(cache, lambda manifest: manifest["splits"].update(train=manifest["splits"]["retain"]))
    with pytest.raises(CorruptCacheError, match="other splits than forget, retain; get the cache"):
        read_manifest(cache)


def test_totals_that_are_not_those_of_the_shards_are_refused(cache: Path) -> None:
    sign(cache, lambda manifest: manifest["splits"]["retain"].update(rows=40))
    with pytest.raises(CorruptCacheError, match=r"\d retain rows in the shards, 40 in the totals"):
        read_manifest(cache)


def test_a_huge_manifest_is_refused_unread(cache: Path) -> None:
    with (cache / "manifest.json").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptCacheError, match=f"more than {MAX_MANIFEST_BYTES} bytes"):
        CacheReader.open(cache)


def test_a_pipe_in_place_of_a_file_does_not_hang(cache: Path) -> None:
    shard(cache).unlink()
    os.mkfifo(shard(cache))
    with pytest.raises(CorruptCacheError, match="the shard is missing"):
        CacheReader.open(cache)
    (cache / "manifest.json").unlink()
    os.mkfifo(cache / "manifest.json")
    with pytest.raises(CacheError, match="unfinished"):
        CacheReader.open(cache)


def test_links_are_followed_and_their_bytes_checked(cache: Path, tmp_path: Path) -> None:
    moved = shard(cache).rename(tmp_path / "blob")
    shard(cache).symlink_to(moved)
    read_all(cache)
    assert verify(cache).problems == ()
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * moved.stat().st_size)
    shard(cache).unlink()
    shard(cache).symlink_to(secret)
    with pytest.raises(CorruptCacheError, match="its bytes have sha256:"):
        read_all(cache)


def test_a_pin_holds_for_the_bytes_of_the_shards(cache: Path) -> None:
    """A shard of the same size, rows and header with another signal in it."""
    digest = read_manifest(cache).digest
    table = pq.read_table(shard(cache))
    data = bytearray(shard(cache).read_bytes())
    pq.write_table(table, shard(cache))
    shard(cache).write_bytes(shard(cache).read_bytes()[: len(data)].ljust(len(data), b"\0"))
    with pytest.raises(CorruptCacheError, match="its bytes have"):
        CacheReader.open(f"{cache}@{digest}").row(0)


def _recipe(**changes: Any) -> Recipe:
    sha = "sha256:" + "ab" * 32
    values: dict[str, Any] = {
        **dict.fromkeys(("weights", "config", "tokenizer", "vocabulary"), sha),
        **{"vocab_size": 90, "chat_template": None, "template_date": "2024-07-26"},
        **{"prefix": "F.", "prefix_place": "raw", "retain_prefix": True, "top_k": 2},
        **{"positions": 1, "logit_dtype": "float16", "compute_dtype": "float32"},
        "eos_token_ids": (1,),
    }
    return Recipe(**{**values, **changes})


def _row(prompt: int = 3, text: str = "query", query_id: str = "q") -> schema.CacheRow:
    logits = np.array([[2.0, 1.0]], np.float32)
    signal = Signal(
        response_ids=np.array([5], np.int32),
        token_ids=np.array([[5, 6]], np.int32),
        logits=logits,
        logsumexp=np.array([3.0], np.float32),
    )
    return schema.CacheRow(
        query_id=query_id,
        split="forget",
        query=text,
        prompt_ids=np.zeros(prompt, np.int32),
        signal=signal,
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_row(prompt=(1 << 20) + 1), "a prompt of 1048577 tokens, the format takes 1048576"),
        (_row(text="ü" * (1 << 23) + "a"), "a text of 16777217 bytes"),
        (_row(query_id="i" * 4097), "an id of 4097 bytes"),
    ],
)
def test_what_a_reader_would_refuse_is_never_written(row: schema.CacheRow, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        check_storable(row, _recipe())


def test_tokens_that_a_strength_moved_below_all_others_are_not_written() -> None:
    row = _row()
    row = replace(row, signal=replace(row.signal, logsumexp=np.array([6.6], np.float32)))
    with pytest.raises(CacheError, match="query q: its tokens were moved below all others; lower"):
        check_storable(row, _recipe(strength=20.0))
    likely = replace(row.signal, logsumexp=np.array([6.4], np.float32))  # 2 + ln 90 is 6.5
    check_storable(replace(row, signal=likely), _recipe(strength=20.0))


def test_row_groups_shrink_with_long_prompts_and_texts() -> None:
    assert row_group_rows([_row()], top_k=100, positions=1) == 10485
    assert row_group_rows([_row()], top_k=1, positions=1) == 1 << 14
    assert row_group_rows([_row(), _row(prompt=8192)], top_k=100, positions=1) == 512
    assert row_group_rows([_row(text="x" * (1 << 20))], top_k=100, positions=1) == 16
    assert row_group_rows([_row()], top_k=1 << 20, positions=16) == 1


def test_a_recipe_of_rows_that_no_reader_could_hold_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a row holds at most 16777216 logits"):
        _recipe(vocab_size=1 << 20, top_k=1 << 20, positions=17)


def test_a_shard_that_is_swapped_while_it_is_read_is_refused(
    cache_of_rows: MakeCache, tmp_path: Path
) -> None:
    """Many shards, so that early ones are closed and opened again, as in training."""
    rows = [(f"q{i}", "forget" if i % 2 else "retain", f"query {i}") for i in range(24)]
    ours = cache_of_rows("ours", rows, shard_rows=2)
    theirs = cache_of_rows("theirs", rows, shard_rows=2, shift=3.0)
    pin = CacheReader.open(ours).manifest.digest
    reader = CacheReader.open(f"{ours}@{pin}")
    for index in range(24):
        reader.row(index)
    for path in (theirs / "shards").iterdir():
        (ours / "shards" / path.name).write_bytes(path.read_bytes())
    reader._recent.clear()
    with pytest.raises(CorruptCacheError, match="its bytes have sha256:|the manifest says"):
        list(map(reader.row, range(24)))


def test_a_shard_that_is_touched_but_not_changed_is_read_on(cache_of_rows: MakeCache) -> None:
    rows = [(f"q{i}", "forget" if i % 2 else "retain", f"query {i}") for i in range(4)]
    cache = cache_of_rows("cache", rows)
    reader = CacheReader.open(cache)
    before = reader.row(0)
    for path in (cache / "shards").iterdir():
        path.touch()
    reader._recent.clear()
    np.testing.assert_array_equal(reader.row(0).logits, before.logits)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("logits", [1.0, 2.0, 0.5, 0.1], "not in descending order"),
        ("logits", [1e25, 2.0, 0.5, 0.1], "logits beyond 1e"),
        ("logsumexp", [-1e30], "a logsumexp below the largest logit"),
        ("logsumexp", [1e30], "a logsumexp above what 90 such logits come to"),
        ("token_ids", [3, 3, 4, 5], "a token id twice at one position"),
    ],
)
def test_what_verify_rejects_is_rejected_while_reading(
    cache_of_rows: MakeCache, column: str, value: list[float], message: str
) -> None:
    cache = cache_of_rows("cache", [("q0", "forget", "query")], logit_dtype="float32")
    there = pq.read_table(shard(cache))[column]
    changed = there.to_pylist()
    changed[0][: len(value)] = value
    put_column(cache, column, pa.array(changed, there.type))
    assert any(message in problem for problem in verify(cache).problems)
    with pytest.raises(CorruptCacheError, match=message):
        CacheReader.open(cache).row(0)


def test_texts_full_of_commas_and_brackets_are_read() -> None:
    value = {"prefix": "1," * 6000, "query": '"[{,' * 5000, "tokens": [",", "\\", '"'] * 50}
    assert parse_json(json.dumps(value)) == value
    with pytest.raises(ValueError, match="Unterminated"):
        parse_json('["' + '\\"' * 2_000_000)


def test_a_manifest_of_millions_of_empty_objects_is_refused_before_it_is_parsed() -> None:
    data = b'{"engines": [' + b"{}," * 5_000_000 + b"{}]}"
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCacheError, match="more values than its size can mean"):
            decode_manifest(data, "manifest.json")
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    finally:
        tracemalloc.stop()
