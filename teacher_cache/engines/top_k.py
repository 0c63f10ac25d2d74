"""Pick the K largest logits of each row, and the logsumexp of the whole row.

Equal logits are common in bfloat16, and a plain `topk` breaks such ties in whatever order its
kernel likes, also at the edge where only some of the tied tokens fit. Here the smaller token id
always wins, so that a signal depends on the logits alone. Both paths sort by one integer key: the
logit's bits, made monotone, above the inverted token id.

Shapes use B for rows, V for the vocabulary and K for the tokens kept.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ID_MASK = 0xFFFFFFFF
_KEY_BYTES = 256 * 2**20
"""Most bytes of integer keys made at a time on a GPU."""


def select_top_k(logits_BV: Any, top_k: int) -> tuple[Any, Any, Any]:
    """Return token ids, logits and logsumexp of each row of a float32 torch tensor.

    Args:
        logits_BV: Raw logits, `[B, V]`, float32, on any device.
        top_k: Tokens to keep, at most V.

    Returns:
        Ids `[B, K]` int32 and logits `[B, K]` float32 by descending logit, ties by ascending id,
        and the logsumexp `[B]` float32 in nats, all as tensors on the device of the logits. Rows
        that hold NaN come back with a NaN logsumexp; nothing waits for the device.
    """
    logsumexp_B = torch.logsumexp(logits_BV, dim=1)
    if logits_BV.device.type == "cpu":
        ids_BK, values_BK = _select_numpy(logits_BV.numpy(), top_k)
        return torch.from_numpy(ids_BK), torch.from_numpy(values_BK), logsumexp_B
    rows = max(1, _KEY_BYTES // (8 * logits_BV.shape[1]))
    parts = [_select_torch(part, top_k) for part in logits_BV.split(rows)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([v for _, v in parts]), logsumexp_B


def read_tokens(logits_BV: Any, ids_BK: Any) -> tuple[Any, Any, Any]:
    """Return token ids that are asked for, their logits, and the logsumexp of each row.

    Args:
        logits_BV: Raw logits, `[B, V]`, float32, on any device.
        ids_BK: Token ids, `[B, K]`, integers on any device.

    Returns:
        As `select_top_k`, in the order asked for.
    """
    ids_BK = ids_BK.to(logits_BV.device)
    logits_BK = logits_BV.gather(1, ids_BK.long())
    return ids_BK.to(torch.int32), logits_BK, torch.logsumexp(logits_BV, dim=1)


def _select_numpy(
    logits_BV: npt.NDArray[np.float32], top_k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    # numpy's partition is several times faster than torch.topk on a CPU, and finding the K-th
    # value first shows every token tied with it.
    rows, width = logits_BV.shape
    ids_BK = np.empty((rows, top_k), dtype=np.int64)
    for row, ids_K in zip(logits_BV, ids_BK, strict=True):
        edge = np.partition(row, width - top_k)[width - top_k]
        found = np.flatnonzero(row >= edge)
        if len(found) > top_k:
            spare = len(found) - top_k
            tied = np.flatnonzero(row[found] == edge)
            found = np.delete(found, tied[-spare:])
        # A NaN sorts last and compares false: such a row comes up short, and its logsumexp says
        # why. What is kept for it does not matter.
        ids_K[:] = found if len(found) == top_k else np.arange(top_k)
    keys_BK = _keys(np.take_along_axis(logits_BV, ids_BK, axis=1), ids_BK)
    keys_BK.sort(axis=1)
    ids_BK = _ID_MASK - (keys_BK[:, ::-1] & _ID_MASK)
    return ids_BK.astype(np.int32), np.take_along_axis(logits_BV, ids_BK, axis=1)


def _select_torch(logits_BV: Any, top_k: int) -> tuple[Any, Any]:
    ids_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    keys_BV = _keys(logits_BV, ids_V, view=(torch.int32, torch.int64))
    keys_BK = torch.topk(keys_BV, top_k, dim=1, sorted=True).values
    ids_BK = _ID_MASK - (keys_BK & _ID_MASK)
    return ids_BK.to(torch.int32), logits_BV.gather(1, ids_BK)


def _keys(logits: Any, ids: Any, view: tuple[Any, Any] = (np.int32, np.int64)) -> Any:
    """Return int64 keys that order by logit first and by descending id within equal logits.

    Works on numpy arrays and torch tensors alike; `view` names the two integer dtypes.
    """
    narrow, wide = view
    # Adding zero turns -0.0 into 0.0: the two are equal but differ in their bits.
    bits = (logits + 0.0).view(narrow)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    widened = bits.astype(wide) if isinstance(bits, np.ndarray) else bits.to(wide)
    return (widened << 32) | (_ID_MASK - ids)
