"""Losses between the student's and the teacher's raw logits at the cached token ids.

Shapes: B rows (queries or views of them), T positions, K cached tokens, V the head's width. Every
function computes in float32 whatever dtype the logits come in (float64 stays).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

LossFunction = Callable[..., Tensor]
"""`loss(student_logits, teacher_logits, *, delta)`: `[..., K]` twice to one value a position,
`[...]`."""


def huber(student_logits: Tensor, teacher_logits: Tensor, *, delta: float) -> Tensor:
    """Huber distance of raw logits, averaged over the K cached tokens (DUET, Eq. 3).

    With `d = student - teacher`, an entry is `d**2 / 2` up to `|d| = delta` and
    `delta * (|d| - delta / 2)` beyond. No softmax is taken, so a shift of all logits counts.

    Args:
        student_logits: `[..., K]`, any floating dtype.
        teacher_logits: `[..., K]`, same shape.
        delta: Where the square turns into a line, in logits, positive.

    Returns:
        One value a position, `[...]` float32.
    """
    distance = (_single(student_logits) - _single(teacher_logits)).abs()
    near = distance.clamp(max=delta)
    # Written without a branch: near * (distance - near / 2) is both cases at once.
    return (near * (distance - 0.5 * near)).mean(dim=-1)


LOSSES: Mapping[str, LossFunction] = MappingProxyType({"huber": huber})
"""The losses by the name that `--loss` takes."""


def cached_logits(logits_BTV: Tensor, token_ids_BTK: Tensor) -> Tensor:
    """Pick the logits of the cached tokens.

    Args:
        logits_BTV: The student's raw logits at the scored positions, `[B, T, V]`.
        token_ids_BTK: Cached token ids, `[B, T, K]` int64, each smaller than V.

    Returns:
        `[B, T, K]` float32.
    """
    return _single(logits_BTV.gather(-1, token_ids_BTK))


def row_means(losses_BT: Tensor, position_mask_BT: Tensor) -> Tensor:
    """Average each row's loss over its own positions, so that long rows weigh no more.

    Args:
        losses_BT: One loss a position, `[B, T]`.
        position_mask_BT: True where the row has a position, `[B, T]`; at least one a row.

    Returns:
        `[B]`. What stands at a masked position, NaN too, has no influence, on gradients either.
    """
    kept = torch.where(position_mask_BT, losses_BT, torch.zeros_like(losses_BT))
    return kept.sum(dim=-1) / position_mask_BT.sum(dim=-1)


def _single(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
