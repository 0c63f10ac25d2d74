"""The README.md of a cache: a dataset card that opens in datasets, pandas, DuckDB and here."""

import json
from pathlib import Path
from typing import Any

from duet_unlearn.files import write_text
from duet_unlearn.teacher_cache.format.manifest import Manifest
from duet_unlearn.teacher_cache.format.schema import COUNTS

CARD_NAME = "README.md"
_QUERY_LENGTH = 80

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

{kept} of a language model {summary}

| | |
| --- | --- |
| queries | {rows} |
| positions per query | up to {positions} |
{facts}
| logits | {logit_dtype}, computed in {compute_dtype} |
| recipe | `{recipe_id}` |
| digest | `{digest}` |

The recipe says what the signals mean, the digest that these are the very bytes: `PATH@{digest}`
pins this cache wherever a cache is named.

{check}## Samples

The teacher's strongest first tokens, with their {probabilities}:

| split | query | tokens |
| --- | --- | --- |
{samples}

## Columns

`query_id`, `split` ({splits}), `query`, `prompt_ids` (the student's prompt, without the
prefix), `response_ids` (T tokens: {tokens}), `token_ids` (T*K, row-major, by
descending logit), `logits` (T*K, {logits}), `logsumexp` (T, {logsumexp}:
`logits - logsumexp` are log-probabilities){counts}.

## Load

```python
import datasets
rows = datasets.load_dataset("parquet", data_files="shards/*.parquet", split="train")

import pandas
rows = pandas.read_parquet("shards")

from duet_unlearn.teacher_cache.reader import CacheReader
row = CacheReader.open(".").row(0)   # row.logits is [T, K]
```

```sql
select split, count(*), avg(logsumexp[1]) from 'shards/*.parquet' group by split
```

Train a student from it: `duet-distill run PATH --student MODEL --out DIR`.
"""

_STEERED = """\
behind a steering prefix, for training a student that
sees the same queries without the prefix. Made by `duet-cache build`; one row per query. It holds no
reference answers."""
_PLAIN = """\
as it is, for training a student on what it says. Made by
`duet-cache build --no-prefix`. Rows of the split `train` may hold responses that its maker gave to
`--responses`, as text and as tokens: they are in this cache and in what is trained from it."""
_COUNTS = """, `counts` (T: tokens of
each position, in place of K in `token_ids` and `logits`)"""
_OR_GIVEN = ", or the response that was given"


def write_card(cache: Path, manifest: Manifest) -> None:
    """Write the cache's dataset card.

    Raises:
        CacheError: The folder cannot be written.
    """
    recipe = manifest.recipe
    rows = " + ".join(f"{sums.rows} {split}" for split, sums in manifest.splits.items())
    facts = ["| steering prefix | none |"]
    if recipe.prefix:
        said = "yes" if recipe.retain_prefix else "no"
        facts = [
            f"| steering prefix ({recipe.prefix_place}) | {_inline(recipe.prefix)} |",
            f"| prefix in front of retain queries | {said} |",
        ]
    if recipe.strength:
        facts.append(f"| forget rows moved further from the base by | {recipe.strength:g} |")
    if recipe.temperature:
        facts.append(f"| answers sampled at temperature | {recipe.temperature:g} |")
    if recipe.top_p < 1:
        facts.append(f"| tokens per position | the fewest that hold {recipe.top_p:g} of the mass |")
    is_sampled = recipe.keep == "sampled"
    if is_sampled:
        facts.append(f"| tokens per position | those that {recipe.top_k} draws find |")
    if recipe.scored is not None:
        facts.append(f"| scored of given responses | {recipe.scored} |")
    text = _CARD.format(
        pretty_name=json.dumps(f"Teacher signals of {manifest.teacher}", ensure_ascii=False),
        teacher=_inline(manifest.teacher),
        kept="Sampled tokens" if is_sampled else f"Top-{recipe.top_k} raw logits",
        probabilities="shares of the draws" if is_sampled else "probabilities",
        logits="ln of how often drawn" if is_sampled else "raw: before softmax and temperature",
        logsumexp="ln of all draws" if is_sampled else "over the full vocabulary",
        rows=rows,
        positions=recipe.positions,
        summary=_STEERED if recipe.prefix else _PLAIN,
        facts="\n".join(facts),
        splits=", ".join(recipe.splits),
        tokens="what the teacher decoded" + (_OR_GIVEN if recipe.scored else ""),
        counts=_COUNTS if COUNTS in recipe.columns else "",
        logit_dtype=recipe.logit_dtype,
        compute_dtype=recipe.compute_dtype,
        recipe_id=manifest.recipe_id,
        digest=manifest.digest,
        check=_check(manifest.check),
        samples="\n".join(map(_sample, manifest.samples)),
    )
    write_text(cache / CARD_NAME, text)


def _check(check: dict[str, Any] | None) -> str:
    """Return the section on how good the teacher is, empty where it was not measured."""
    if check is None:
        return ""
    rows = "\n".join(
        f"| {_inline(name)} | {_inline(str(value))} |" for name, value in check.items()
    )
    return f"## The teacher, measured on a sample\n\n| | |\n| --- | --- |\n{rows}\n\n"


def _sample(sample: dict[str, Any]) -> str:
    tokens = ", ".join(
        f"{_code(token['text'])} {token['probability']:.2f}" for token in sample["strongest"][:5]
    )
    query = _inline(sample["query"])
    return f"| {sample['split']} | {query[:_QUERY_LENGTH]} | {tokens} |"


def _code(text: str) -> str:
    """Return a token as code: blanks and control characters visible, no border of the table."""
    shown = repr(text)[1:-1].replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if text.strip() else f"`{text!r}`"


def _inline(text: str) -> str:
    """Return text for one table cell: no line breaks, no cell borders."""
    return " ".join(text.split()).replace("|", "\\|")
