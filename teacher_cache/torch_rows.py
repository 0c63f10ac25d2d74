"""The rows of a cache as a torch dataset, for training code of one's own."""

import copy
import os
from typing import Any

import torch
from torch.utils.data import Dataset

from duet_unlearn.teacher_cache.reader import CacheReader, Shards


class TorchRows(Dataset[dict[str, Any]]):
    """A row is a dict: its texts as they are, its arrays as tensors of their own.

    `prompt_ids` [P], `response_ids` [T] and `token_ids` [T, K] are int64, `logits` [T, K] and
    `logsumexp` [T] are float32, minus infinity where a position has fewer than K tokens. Rows
    differ in P and T: a loader takes `batch_size=None` or a collate function.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._reader: tuple[int, CacheReader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_shards": self._shards, "_reader": None}

    def __len__(self) -> int:
        return self._shards.manifest.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        # A loader's processes cannot share the place in a file that one of them reads from.
        if self._reader is None or self._reader[0] != os.getpid():
            # The copy leaves out connections, which a fork would share.
            self._reader = (os.getpid(), CacheReader(copy.copy(self._shards)))
        row = self._reader[1][index]
        ids = {name: getattr(row, name) for name in ("prompt_ids", "response_ids", "token_ids")}
        return {
            "query_id": row.query_id,
            "split": row.split,
            "query": row.query,
            **{name: torch.tensor(values, dtype=torch.int64) for name, values in ids.items()},
            "logits": torch.tensor(row.logits),
            "logsumexp": torch.tensor(row.logsumexp),
        }
