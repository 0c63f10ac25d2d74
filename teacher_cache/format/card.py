"""The README.md of a cache: a dataset card that opens in datasets, pandas, DuckDB and here."""

import json
from pathlib import Path

from duet_unlearn.files import write_text
from duet_unlearn.teacher_cache.format.manifest import Manifest
from duet_unlearn.teacher_cache.format.schema import SPLITS

CARD_NAME = "README.md"

_CARD = """\
---
pretty_name: {pretty_name}
tags:
- duet-teacher-cache
- unlearning
- distillation
configs:
- config_name: default
  data_files: shards/*.parquet
---

# Teacher signals of {teacher}

Top-{top_k} raw logits of a language model behind a steering prefix, for training a student that
sees the same queries without the prefix. Made by `duet-cache build`; one row a query. It holds no
reference answers.

| | |
| --- | --- |
| queries | {rows} |
| positions a query | up to {positions} |
| steering prefix ({place}) | {prefix} |
| prefix in front of retain queries | {retain_prefix} |
| logits | {logit_dtype}, computed in {compute_dtype} |
| recipe | `{recipe_id}` |

The manifest's digest names this cache: `PATH@sha256:...` pins it wherever a cache is named.

## Columns

`query_id`, `split` (forget or retain), `query`, `prompt_ids` (the student's prompt, without the
prefix), `response_ids` (the teacher's greedy tokens, T), `token_ids` (T*K, row-major, by falling
logit), `logits` (T*K, raw: before softmax and temperature), `logsumexp` (T, over the full
vocabulary: `logits - logsumexp` are log-probabilities).

## Load

```python
import datasets
rows = datasets.load_dataset("parquet", data_files="shards/*.parquet", split="train")

import pandas
rows = pandas.read_parquet("shards")

import duckdb
rows = duckdb.sql("select * from 'shards/*.parquet'")

from duet_unlearn.teacher_cache.reader import CacheReader
row = CacheReader.open(".").row(0)   # row.logits is [T, K]
```

Train a student from it: `duet-distill run PATH --student MODEL --out DIR`.
"""


def write_card(cache: Path, manifest: Manifest) -> None:
    """Write the cache's dataset card.

    Raises:
        CacheError: The folder cannot be written.
    """
    recipe = manifest.recipe
    rows = " + ".join(f"{manifest.splits[split].rows} {split}" for split in SPLITS)
    text = _CARD.format(
        pretty_name=json.dumps(f"Teacher signals of {manifest.teacher}", ensure_ascii=False),
        teacher=_inline(manifest.teacher),
        top_k=recipe.top_k,
        rows=rows,
        positions=recipe.positions,
        place=recipe.prefix_place,
        prefix=_inline(recipe.prefix),
        retain_prefix="yes" if recipe.retain_prefix else "no",
        logit_dtype=recipe.logit_dtype,
        compute_dtype=recipe.compute_dtype,
        recipe_id=manifest.recipe_id,
    )
    write_text(cache / CARD_NAME, text)


def _inline(text: str) -> str:
    """Return text for one table cell: no line breaks, no cell borders."""
    return " ".join(text.split()).replace("|", "\\|")
