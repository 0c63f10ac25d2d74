"""A few queries with the teacher's strongest tokens in words, kept in the manifest.

`inspect` shows them without a tokenizer at hand. They come from the cached signals alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.messages import split_view
from duet_unlearn.data.models.tokenizer import token_text
from duet_unlearn.teacher_cache.format.manifest import ShardEntry
from duet_unlearn.teacher_cache.format.row_group import RowGroup
from duet_unlearn.teacher_cache.format.schema import SPLITS
from duet_unlearn.teacher_cache.format.shard import ShardFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUERIES_PER_SPLIT = 3
STRONGEST = 10
# A manifest is small, whatever a row holds.
_MOST_TEXT, _MOST_TOKENS = 2000, 64


def collect_samples(
    cache: Path, shards: Sequence[ShardEntry], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[dict[str, Any], ...]:
    """Return samples of every split: query, response and ten strongest tokens at position 0."""
    wanted = dict.fromkeys(SPLITS, QUERIES_PER_SPLIT)
    samples = []

    def adds(shard: ShardEntry) -> bool:
        return any(wanted[split] and count for split, count in shard.rows.items())

    for shard in filter(adds, shards):
        file = ShardFile(cache / shard.path)
        for group in file.row_groups():
            for row in range(group.num_rows):
                if wanted[group.split(row)] and split_view(group.query(row))[0] is None:
                    wanted[group.split(row)] -= 1
                    samples.append(_sample(group, row, tokenizer))
            if not adds(shard):
                break
        file.close()
    return tuple(sorted(samples, key=lambda sample: SPLITS.index(sample["split"])))


def _sample(group: RowGroup, row: int, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    first, stop = (int(i) for i in group.response_offsets[row : row + 2])
    response = group.response_ids[first:stop][:_MOST_TOKENS].tolist()
    logsumexp = float(group.logsumexp[first])
    shown = min(STRONGEST, int(group.counts[first]))
    strongest = zip(
        group.token_ids[first, :shown].tolist(),
        group.logits[first, :shown].tolist(),
        strict=True,
    )
    return {
        "query_id": group.query_id(row),
        "split": group.split(row),
        "query": group.query(row)[:_MOST_TEXT],
        "response": [token_text(tokenizer, i) for i in response],
        "strongest": [
            {
                "id": token,
                "text": token_text(tokenizer, token),
                "logit": round(logit, 4),
                "probability": round(math.exp(min(logit - logsumexp, 0.0)), 6),
            }
            for token, logit in strongest
        ],
    }
