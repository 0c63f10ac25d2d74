"""Mutated caches yield our own errors and nothing else: no crash, no hang, no large allocation.

Every input is one number, which seeds one mutation. They run in a process of their own with a
limit on memory, so that a crash of the Parquet library or a huge allocation shows. A forger's
mutations come with fitting hashes: only then do they get past the manifest.

`DUET_FUZZ_INPUTS` sets how many run; `python tests/teacher_cache/test_fuzz.py FIRST COUNT` runs
some by hand.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from duet_unlearn.data.errors import CacheError
from duet_unlearn.data.queries import Query, fingerprint_queries
from duet_unlearn.teacher_cache.assemble import Assembly
from duet_unlearn.teacher_cache.diff import diff
from duet_unlearn.teacher_cache.fingerprint import sha256_file, sha256_json
from duet_unlearn.teacher_cache.inspect import render_summary, summarize
from duet_unlearn.teacher_cache.plan import plan_shards
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.recipe import Recipe
from duet_unlearn.teacher_cache.resume import PlannedCache
from duet_unlearn.teacher_cache.row_source import RowSource
from duet_unlearn.teacher_cache.schema import CacheRow
from duet_unlearn.teacher_cache.signals import Signal
from duet_unlearn.teacher_cache.verify import verify

INPUTS = int(os.environ.get("DUET_FUZZ_INPUTS", "300"))
MEMORY = 1 << 30
"""Address space beyond what the libraries take, in bytes."""
SECONDS = 5.0
"""Processor time above which a single input counts as a hang; sound ones take milliseconds."""
RESIDENT = 192 << 20
"""Most resident memory that one input may take, in bytes; a sound cache decodes to kilobytes."""

SHA = "sha256:" + "ab" * 32
SIZES = (0, 1, -1, 2, 3, 255, 1 << 16, 1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 62, 1 << 70)
NUMBERS = (0, -1, 1, 89, 90, 2**31 - 1, -(2**31), 3e38, -3e38, 65504.0, float("nan"), float("inf"))
TEXTS = ("", "x" * 100_000, "../../etc/passwd", "\0", "\x1b[2J", "\ud800", "sha256:" + "0" * 64)
HOSTILE: tuple[Any, ...] = (
    *SIZES,
    *TEXTS,
    *(None, True, False, 1e308, 0.5, -0.0, float("nan"), float("inf")),
    *([], {}, [[]], {"a": 1}, [1, 2, 3], ["x"], [{}] * 3),
)


def test_mutated_caches_give_our_own_errors_only(tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    result = subprocess.run(
        [sys.executable, __file__, "0", str(INPUTS), str(progress)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last = progress.read_text() if progress.exists() else "none"
    assert result.returncode == 0, f"input {last}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["inputs"] == INPUTS
    # Mutations that all bounce off the first check would test nothing.
    assert counts["refused"] > INPUTS // 2
    assert counts["decoded"] > INPUTS // 50


def write_base(folder: Path, logit_dtype: str) -> Path:
    """Write a sound cache of two shards."""
    queries = [
        Query.from_text(f"query {i} ü", split="forget" if i % 2 else "retain", query_id=f"q{i}")
        for i in range(8)
    ]
    recipe = Recipe(
        **dict.fromkeys(("weights", "config", "tokenizer", "vocabulary"), SHA),
        vocab_size=90,
        chat_template=None,
        template_date="2024-07-26",
        prefix="Forget.",
        prefix_place="raw",
        retain_prefix=True,
        top_k=4,
        positions=2,
        logit_dtype=logit_dtype,
        compute_dtype="float32",
        eos_token_ids=(1,),
    )
    shards = plan_shards(queries, 4)
    (folder / "shards").mkdir(parents=True)
    plan = PlannedCache(
        folder=folder,
        recipe=recipe,
        queries=fingerprint_queries(queries),
        shards=tuple(map(tuple, shards)),
    )
    assembly = Assembly(plan)
    for index, shard in enumerate(shards):
        assembly.write(index, [_row(query) for query in shard], ({"engine": "test"},))
    strongest = [{"id": 3, "text": "a", "logit": 1.5, "probability": 0.25}]
    sample = {"query_id": "q0", "split": "retain", "query": "query 0 ü", "response": ["a"]}
    assembly.finish("tiny", ({**sample, "strongest": strongest},))
    return folder


def _row(query: Query) -> CacheRow:
    rng = np.random.default_rng(int(query.query_id[1:]))
    logits = -np.sort(-rng.normal(0, 2, (2, 4)), axis=1).astype(np.float32)
    return CacheRow(
        query_id=query.query_id,
        split=query.split,
        query=query.text,
        prompt_ids=np.arange(3, dtype=np.int32),
        signal=Signal(
            response_ids=np.array([7, 8], np.int32),
            token_ids=np.stack([rng.choice(90, 4, replace=False) for _ in "ab"]).astype(np.int32),
            logits=logits,
            logsumexp=(logits.max(axis=1) + 1).astype(np.float32),
        ),
    )


def shard_of(cache: Path, rng: random.Random) -> Path:
    return cache / "shards" / f"0000{rng.randrange(2)}-of-00002.parquet"


def list_in_manifest(cache: Path) -> None:
    """Make the manifest agree with the shards' bytes, as a forger would."""
    value = json.loads((cache / "manifest.json").read_text())
    for entry in value["shards"]:
        path = cache / "shards" / entry["name"]
        entry["bytes"] = path.stat().st_size
        entry["sha256"] = sha256_file(path)
    sign(cache, value)


def sign(cache: Path, value: dict[str, Any]) -> None:
    value.pop("digest", None)
    text = json.dumps({**value, "digest": sha256_json(value)})
    (cache / "manifest.json").write_text(text)


def mutate_bytes(data: bytes, rng: random.Random, first: int = 0) -> bytes:
    """Flip, overwrite, insert, delete, repeat or cut some bytes from `first` on."""
    changed = bytearray(data or b"0")
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(first, max(first + 1, len(changed)))
        length = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            changed[at:at] = rng.choice((b"\xff", b"\x00", b"\x80", b"[", b'"', b"9")) * length
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif at < len(changed):
            # The largest numbers of a variable-length encoding.
            changed[at] = rng.choice((0x7F, 0x80, 0xFE, 0xFF))
    stop = len(changed) if rng.random() > 0.05 else rng.randrange(len(changed) + 1)
    return bytes(changed[:stop])


def manifest_bytes(cache: Path, rng: random.Random) -> None:
    path = cache / "manifest.json"
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def manifest_text(cache: Path, rng: random.Random) -> None:
    path = cache / "manifest.json"
    text = path.read_text()
    deep = rng.choice((50, 900, 5000, 100_000))
    value = rng.choice(
        ("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, "9" * deep, "1e999", "NaN")
    )
    name = rng.choice(("teacher", "top_k", "rows", "bytes", "engine", "mass", "format_version"))
    place = text.find(f'"{name}": ') + len(name) + 4
    if rng.random() < 0.3:
        path.write_text(text.replace("{", '{"format": 1, "format": 2, "a": 1, "a": 2,', 1))
    elif rng.random() < 0.5:
        path.write_text(text[:place] + value + "," + text[place:])
    else:
        path.write_text(value)


def replace_somewhere(value: Any, rng: random.Random) -> Any:
    """Return JSON values with one of them replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.06:
            del changed[key]
        elif rng.random() < 0.06:
            changed[rng.choice(("x", "\ud800", "../x"))] = changed.pop(key)
        else:
            changed[key] = replace_somewhere(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value * rng.choice((0, 2, 1000))
        return [*value[:at], replace_somewhere(value[at], rng), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 1 << 10, 1 << 20, 1 << 31))
    return rng.choice(HOSTILE)


def manifest_values(cache: Path, rng: random.Random) -> None:
    value = json.loads((cache / "manifest.json").read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = replace_somewhere(value, rng)
    if isinstance(value, dict) and rng.random() < 0.7 and "recipe" in value:
        value["recipe_id"] = sha256_json(value["recipe"])
    if isinstance(value, dict):
        sign(cache, value)
    else:
        (cache / "manifest.json").write_text(json.dumps(value))


def shard_bytes(cache: Path, rng: random.Random) -> None:
    path = shard_of(cache, rng)
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    if rng.random() < 0.9:
        list_in_manifest(cache)


def footer_bytes(cache: Path, rng: random.Random) -> None:
    path = shard_of(cache, rng)
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = mutate_bytes(data[start:-8], rng)
    path.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    list_in_manifest(cache)


def page_bytes(cache: Path, rng: random.Random) -> None:
    """Change bytes of one column's pages, without checksums that would catch it."""
    plain_shard(cache, rng)
    path = shard_of(cache, rng)
    column = pq.ParquetFile(path).metadata.row_group(0).column(rng.randrange(8))
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = start + rng.randrange(column.total_compressed_size)
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, data[at] ^ 1, rng.randrange(256)))
    path.write_bytes(bytes(data))
    list_in_manifest(cache)


def plain_shard(cache: Path, rng: random.Random) -> None:
    """Rewrite the shards as another writer might."""
    compression = rng.choice(("none", "snappy", "zstd", "gzip"))
    pages = rng.choice(("1.0", "2.0"))
    dictionary = rng.random() < 0.5
    for path in (cache / "shards").iterdir():
        pq.write_table(
            pq.read_table(path),
            path,
            compression=compression,
            data_page_version=pages,
            use_dictionary=dictionary,
        )


def shard_metadata(cache: Path, rng: random.Random) -> None:
    path = shard_of(cache, rng)
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    key = rng.choice(sorted(k for k in metadata if k.startswith(b"duet.")))
    if rng.random() < 0.1:
        del metadata[key]
    elif rng.random() < 0.5:
        metadata[key] = mutate_bytes(metadata[key], rng)
    else:
        try:
            value = json.loads(metadata[key])
        except ValueError:
            value = 1
        text = json.dumps(replace_somewhere(value, rng))
        metadata[key] = text.encode()
        if key == b"duet.recipe" and rng.random() < 0.8:
            metadata[b"duet.recipe_id"] = sha256_json(json.loads(text)).encode()
    pq.write_table(table.replace_schema_metadata(metadata), path)
    list_in_manifest(cache)


def shard_columns(cache: Path, rng: random.Random) -> None:
    """Write a column of hostile values, or of another type, as sound Parquet."""
    path = shard_of(cache, rng)
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    column = hostile_column(table[name].to_pylist(), table.schema.field(name).type, rng)
    at = table.schema.get_field_index(name)
    table = table.set_column(at, pa.field(name, column.type), column)
    if rng.random() < 0.1:
        table = pa.concat_tables([table] * 3)
    if rng.random() < 0.1:
        table = table.select(rng.sample(table.column_names, rng.randrange(1, 8)))
    pq.write_table(table, path, row_group_size=rng.choice((1, 2, 4, 100)))
    list_in_manifest(cache)


def hostile_column(values: list[Any], kind: pa.DataType, rng: random.Random) -> pa.Array:
    row = rng.randrange(len(values))
    if isinstance(values[row], list):
        change = rng.randrange(7)
        number = rng.choice(NUMBERS)
        if pa.types.is_integer(kind.value_type):
            number = number if isinstance(number, int) else 5
        else:
            with np.errstate(over="ignore"):
                number = np.dtype(kind.value_type.to_pandas_dtype()).type(number)
        if change == 0:
            values[row] = [number] * rng.choice((0, 1, 2, 8, 9, 100_000, 6_000_000))
        elif change == 1:
            values[row] = None
        elif change == 2:
            values[row] = [None, *values[row][1:]]
        elif change == 3:
            values[row] = values[row][: rng.randrange(len(values[row]))]
        elif change == 4:
            kind = rng.choice(
                (pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.string()))
            )
            values = (
                [[1, 2]] * len(values) if kind.value_type != pa.string() else [["a"]] * len(values)
            )
        elif change == 5:
            return pa.array([b"binary"] * len(values))
        else:
            values[row] = [number, *values[row][1:]]
        return pa.array(values, kind)
    change = rng.randrange(6)
    if change == 0:
        values[row] = None
    elif change == 1:
        values[row] = "y" * rng.choice((1 << 12, (1 << 12) + 1, 1 << 20, (1 << 24) + 1))
    elif change == 2:
        return pa.array(values, rng.choice((pa.large_string(), pa.string(), pa.binary())))
    elif change == 3:
        # Text that is no UTF-8; Arrow only finds out when asked to look.
        text = b"\xff\xfe" * len(values)
        offsets = np.arange(len(values) + 1, dtype=np.int32) * 2
        return pa.Array.from_buffers(
            pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        )
    elif change == 4:
        return pa.array([1] * len(values))
    else:
        values[row] = rng.choice(("", "other", "forget", "q1", "\0", "\x1b[31m"))
    return pa.array(values, pa.string())


def bomb(cache: Path, rng: random.Random) -> None:
    """A few hundred bytes that decode to a very long list, or to one text over and over."""
    path = shard_of(cache, rng)
    table = pq.read_table(path)
    rows = table.num_rows
    if rng.random() < 0.5:
        name = rng.choice(("prompt_ids", "response_ids", "token_ids"))
        count = rng.choice((1 << 20, 5_000_000))
        values = np.full(count * rows, 7, np.int32)
        offsets = np.arange(rows + 1, dtype=np.int32) * count
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    else:
        name = rng.choice(("query", "query_id"))
        column = pa.array(["z" * (1 << 22)] * rows)
    at = table.schema.get_field_index(name)
    table = table.set_column(at, pa.field(name, column.type), column)
    pq.write_table(table, path, compression="zstd")
    data = path.read_bytes()
    if rng.random() < 0.5:
        data = forge_counts(data, rng)
    path.write_bytes(data)
    list_in_manifest(cache)


def forge_counts(data: bytes, rng: random.Random) -> bytes:
    """Let the footer claim a small number where it says a large one, in as many bytes."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for column in range(8):
        chunk = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(column)
        if chunk.num_values > 1000:
            claim = rng.choice((1, 4, 8, 100))
            old = _varint(2 * chunk.num_values)
            new = _varint(2 * claim, pad=len(old))
            data = data[:start] + data[start:].replace(old, new)
    return data


def _varint(number: int, pad: int = 0) -> bytes:
    out = bytearray()
    while number > 127 or len(out) + 1 < pad:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


MUTATIONS: tuple[tuple[Callable[[Path, random.Random], None], int], ...] = (
    (manifest_bytes, 2),
    (manifest_text, 1),
    (manifest_values, 5),
    (shard_bytes, 3),
    (footer_bytes, 4),
    (page_bytes, 4),
    (shard_metadata, 3),
    (shard_columns, 4),
    (bomb, 1),
)


def use(cache: Path) -> None:
    """Do what a user does with a cache that came from elsewhere."""
    render_summary(summarize(cache)).encode()
    report = verify(cache)
    "\n".join(report.problems).encode()
    difference = diff(str(cache), str(cache))
    json.dumps(difference.to_json(), ensure_ascii=False).encode()
    reader = CacheReader.open(cache)
    for index in range(reader.num_rows):
        reader.row(index)
    source = RowSource([reader])
    source.fetch([place for place, _ in source.scan()])


STEPS: tuple[Callable[[Path], object], ...] = (
    use,
    verify,
    lambda cache: [reader.row(i) for reader in [CacheReader.open(cache)] for i in range(8)],
)


def run_input(number: int, bases: Sequence[Path], work: Path) -> tuple[str, str]:
    """Run one input; return its mutation and `sound` or `refused`, or raise what was foreign."""
    rng = random.Random(number)
    mutation = rng.choices([m for m, _ in MUTATIONS], [weight for _, weight in MUTATIONS])[0]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(rng.choice(bases), work)
    mutation(work, rng)
    outcome = "sound"
    for step in STEPS:
        started, before = time.process_time(), peak_memory(restart=True)
        try:
            step(work)
        except CacheError as error:
            outcome = "refused"
            text = str(error)
            text.encode()
            if "\n" in text or any(word in text for word in ("alloc", "emory")):
                raise AssertionError(f"an allocation or two lines: {text[:300]}") from error
        except IndexError as error:
            if "of a cache with" not in str(error):
                raise
        taken = time.process_time() - started
        grown = peak_memory() - before
        if taken > SECONDS or grown > RESIDENT:
            raise AssertionError(f"took {taken:.0f} s and {grown >> 20} MiB")
    return mutation.__name__, outcome


def peak_memory(*, restart: bool = False) -> int:
    """Return the most resident memory since the last restart, in bytes; 0 where unknown."""
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def main(first: int, count: int, progress: Path | None) -> int:
    """Run inputs in this process, with a limit on memory; print what came of them as JSON."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    os.environ["TQDM_DISABLE"] = "1"
    # A warning of a library would reach the user's terminal.
    warnings.simplefilter("error")
    bad = 0
    outcomes: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bases = [write_base(Path(folder) / dtype, dtype) for dtype in ("float16", "float32")]
        for base in bases:
            assert verify(base).problems == ()
            use(base)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in range(first, first + count):
            if progress is not None:
                progress.write_text(str(number))
            try:
                name, outcome = run_input(number, bases, Path(folder) / "work")
            except Exception:
                bad += 1
                print(f"input {number}:", traceback.format_exc(limit=-6), flush=True)
                continue
            counts = outcomes.setdefault(name, {"sound": 0, "refused": 0})
            counts[outcome] += 1
    summary = {
        "inputs": count,
        "bad": bad,
        "refused": sum(counts["refused"] for counts in outcomes.values()),
        "decoded": sum(counts["sound"] for counts in outcomes.values()),
        "outcomes": outcomes,
    }
    print(json.dumps(summary))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3:] else None))
