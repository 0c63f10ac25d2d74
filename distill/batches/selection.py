"""Which positions of a row a loss is taken at: those where the teacher is least sure.

At most positions of a text the teacher is all but certain, and so is the student soon. Taking the
share of each sequence's positions with the highest score is the Top-k% policy of "Rethinking
Selective Knowledge Distillation" (arXiv 2602.01395). Of the scores compared there the teacher's
entropy is the one that a cache holds: it picks the same positions in every step, before the student
reads a token, so that the student's head is computed there alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from duet_unlearn.distill.batches.sampler import TRAIN
from duet_unlearn.distill.losses import tail_logsumexp


def entropy(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """Return the entropy of a teacher whose tokens beyond the K are one symbol.

    Args:
        logits: `[..., K]` raw logits of the K tokens, minus infinity in places without one.
        logsumexp: `[...]` over the full vocabulary.

    Returns:
        Nats a position, `[...]` float32; at most the log of K + 1, and at most the entropy over the
        full vocabulary.
    """
    tail = tail_logsumexp(logits, logsumexp).unsqueeze(-1)
    shares = torch.cat([logits, tail], dim=-1).softmax(dim=-1)
    nats: Tensor = torch.special.entr(shares).sum(dim=-1)
    return nats


def least_sure(batch: Mapping[str, Any], share: float) -> Tensor:
    """Choose positions of the rows of the split `train`; other rows keep all of theirs.

    Args:
        batch: From `collate`.
        share: Of each row's positions, above 0; rounded up, so every row keeps one. Of equals the
            earlier.

    Returns:
        `[B, T]` bool.
    """
    mask_BT: Tensor = batch["position_mask"]
    found_BT = entropy(batch["teacher_logits"], batch["teacher_logsumexp"])
    order_BT = found_BT.masked_fill(~mask_BT, -1.0).argsort(descending=True, stable=True)
    # In float64, and less a hair: 0.1 of 30 positions are 3.
    kept_B = (mask_BT.sum(dim=-1, dtype=torch.float64) * share - 1e-9).ceil().clamp(min=1)
    rank_BT = order_BT.argsort()
    return torch.where(batch["split"][:, None] == TRAIN, rank_BT < kept_B[:, None], mask_BT)
