"""Footers that lie, or end the Parquet library's process: the shard is refused in one line."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duet_unlearn.data.models.fingerprint import sha256_json
from duet_unlearn.errors import CacheError, CorruptCacheError
from duet_unlearn.teacher_cache.format import shard as shard_module
from duet_unlearn.teacher_cache.format.quarantine import find_problems
from duet_unlearn.teacher_cache.format.shard import ShardFile

_TREE = runpy.run_path(str(Path(__file__).parents[1] / "fuzz" / "thrift_tree.py"))
parse: Callable[[bytes], list[Any]] = _TREE["parse"]
pack: Callable[[list[Any]], bytes] = _TREE["pack"]

ROWS = [(f"q{i}", "forget" if i < 2 else "retain", f"query {i}") for i in range(4)]
I32, I64, BINARY = 5, 6, 8


@pytest.fixture(params=["float16", "float32"])
def shard(cache_of_rows: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    """A sound shard of four rows, with logits in float16 or float32."""
    cache = cache_of_rows("cache", ROWS, logit_dtype=request.param)
    return cache / "shards" / "00000-of-00001.parquet"


def take_apart(shard: Path) -> tuple[bytes, list[Any]]:
    """Return a shard's bytes up to the footer, and the footer as a tree."""
    data = shard.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[:start], parse(data[start:-8])


def put_together(shard: Path, pages: bytes, tree: list[Any]) -> None:
    footer = pack(tree)
    shard.write_bytes(pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def at(tree: list[Any], *path: int) -> Any:
    """Follow field ids, and indices of lists, to a value."""
    for step in path:
        if tree and isinstance(tree[0], int):
            tree = tree[1][step]
        else:
            tree = next(value for number, _, value in tree if number == step)
    return tree


def put(tree: list[Any], *path: int, wire: int, value: Any) -> None:
    """Set or add a field of a struct."""
    *path_to_struct, number = path
    fields = at(tree, *path_to_struct)
    fields[:] = [entry for entry in fields if entry[0] != number]
    fields.append([number, wire, value])
    fields.sort(key=lambda entry: entry[0])


COLUMN = (4, 0, 1, 3, 3)
"""The description of `prompt_ids` in the first row group."""

LIES: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    # pyarrow 26 aborts: more counts of definition levels than the column has levels.
    "levels": (lambda t: at(t, *COLUMN, 16, 3)[1].append(7), "reading it ends the process with"),
    "rows of a group": (lambda t: put(t, 4, 0, 3, wire=I64, value=5), ""),
    "negative rows": (lambda t: put(t, 4, 0, 3, wire=I64, value=-4), "a row group of -4 rows"),
    "many rows": (lambda t: put(t, 4, 0, 3, wire=I64, value=1 << 40), "a row group of 1099511627"),
    "a column less": (lambda t: at(t, 4, 0, 1)[1].pop(), ""),
    "columns swapped": (lambda t: at(t, 4, 0, 1)[1].reverse(), ""),
    "negative size": (lambda t: put(t, *COLUMN, 6, wire=I64, value=-1), "column of -1 bytes"),
    "behind the end": (lambda t: put(t, *COLUMN, 7, wire=I64, value=1 << 50), ""),
    "another name": (lambda t: put(t, 2, 3, 4, wire=BINARY, value=b"answer"), "damaged shard"),
    "another type": (lambda t: put(t, 2, 6, 1, wire=I32, value=2), "of another type|damaged"),
    "no list": (lambda t: put(t, 2, 5, 3, wire=I32, value=1), "of another type|damaged"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_footers_that_lie_are_refused_by_the_child(
    shard: Path, change: Callable[[list[Any]], Any], message: str
) -> None:
    recipe = ShardFile(shard).header.recipe
    assert list(find_problems([shard], recipe)) == [None]
    sound = shard.read_bytes()
    pages, tree = take_apart(shard)
    change(tree)
    put_together(shard, pages, tree)
    other = shard.with_name("other.parquet")
    other.write_bytes(sound)
    # The one after it is still looked at, whatever became of the process.
    problem, none = find_problems([shard, other], recipe)
    assert none is None
    assert problem is not None
    assert problem.startswith(f"{shard}: damaged shard (")
    assert "\n" not in problem
    assert any(text in problem for text in message.split("|"))


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1PAR1", b"PAR1" + bytes(4) + b"PARE", b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1"],
)
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CorruptCacheError, match="damaged shard"):
        ShardFile(tmp_path / "x")


def test_logits_of_another_width_than_the_recipes_are_refused(shard: Path) -> None:
    pages, tree = take_apart(shard)
    for pair in at(tree, 5)[1]:
        if pair[0][2] == b"duet.recipe":
            recipe = json.loads(pair[1][2])
            there = recipe["logit_dtype"]
            recipe["logit_dtype"] = "float32" if there == "float16" else "float16"
            pair[1][2] = json.dumps(recipe).encode()
        if pair[0][2] == b"duet.recipe_id":
            id_pair = pair
    id_pair[1][2] = sha256_json(recipe).encode()
    put_together(shard, pages, tree)
    with pytest.raises(CorruptCacheError, match=f"logits in {there}, its recipe says"):
        ShardFile(shard)


def test_a_shard_that_no_reader_would_take_is_not_kept(
    cache_of_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "MAX_FOOTER_BYTES", 1000)
    with pytest.raises(CacheError, match=r"expected at most 1000\); give a smaller --shard-rows"):
        cache_of_rows("cache", ROWS)
    assert not list((tmp_path / "cache" / "shards").iterdir())
