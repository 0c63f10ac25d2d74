"""Sound caches to mutate, and what a forger does to make a changed one consistent again."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from duet_unlearn.data.models.fingerprint import sha256_file, sha256_json
from duet_unlearn.data.queries import Query, fingerprint_queries
from duet_unlearn.teacher_cache.build.assemble import Assembly, PlannedCache
from duet_unlearn.teacher_cache.build.plan import plan_shards
from duet_unlearn.teacher_cache.engines.sampling import sample_top_k
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import CacheRow
from duet_unlearn.teacher_cache.format.signal import Signal, keep_mass

SHA = "sha256:" + "ab" * 32


def write_base(folder: Path, logit_dtype: str, top_p: float = 1.0, keep: str = "strongest") -> Path:
    """Write a sound cache of two shards; that of float32 logits has format version 2.

    With `top_p` below 1 it has the column `counts`, with sampled tokens format version 3 too.
    """
    splits = ("retain", "forget") if logit_dtype == "float16" else ("retain", "forget", "train")
    queries = [
        Query.from_text(f"query {i} ü", split=splits[i % len(splits)], query_id=f"q{i}")
        for i in range(8)
    ]
    recipe = Recipe(
        **dict.fromkeys(("weights", "config", "tokenizer", "vocabulary"), SHA),
        vocab_size=90,
        chat_template=None,
        template_date="2024-07-26",
        prefix="Forget." if keep == "strongest" else "",
        prefix_place="raw",
        retain_prefix=True,
        top_k=4,
        positions=2,
        logit_dtype=logit_dtype,
        compute_dtype="float32",
        eos_token_ids=(1,),
        scored="assistant" if "train" in splits else None,
        top_p=top_p,
        keep=keep,
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
        assembly.write(index, [_row(query, top_p, keep) for query in shard], ({"engine": "test"},))
    strongest = [{"id": 3, "text": "a", "logit": 1.5, "probability": 0.25}]
    sample = {"query_id": "q0", "split": "retain", "query": "query 0 ü", "response": ["a"]}
    assembly.finish("tiny", ({**sample, "strongest": strongest},))
    return folder


def _row(query: Query, top_p: float, keep: str) -> CacheRow:
    rng = np.random.default_rng(int(query.query_id[1:]))
    # What was given may end anywhere.
    length = 1 if query.split == "train" else 2
    logits = -np.sort(-rng.normal(0, 2, (length, 4)), axis=1).astype(np.float32)
    signal = Signal(
        response_ids=np.array([7, 8], np.int32)[:length],
        token_ids=np.stack([rng.choice(90, 4, replace=False) for _ in logits]).astype(np.int32),
        logits=logits,
        logsumexp=(logits.max(axis=1) + 1).astype(np.float32),
    )
    if keep == "sampled":
        drawn = sample_top_k(torch.from_numpy(logits), rng.random(length), 4)
        places, draws, logsumexp = (part.numpy() for part in drawn)
        signal = Signal(
            response_ids=signal.response_ids,
            token_ids=np.take_along_axis(signal.token_ids, places.astype(np.int64), axis=1),
            logits=draws,
            logsumexp=logsumexp,
        )
    return CacheRow(
        query_id=query.query_id,
        split=query.split,
        query=query.text,
        prompt_ids=np.arange(3, dtype=np.int32),
        signal=signal if top_p == 1 else keep_mass(signal, top_p),
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
