"""Draw tokens so that the same seed gives the same ones on every engine: responses, kept tokens.

A row's seed gives one number in [0, 1) a position, and that number picks a token from the
distribution's cumulative sums in the order of token ids. What is drawn depends on the row alone,
not on its batch, its engine or how often it was preempted; rounding can tip a draw only where the
number falls on the border of two tokens. Samplers of engines promise less: they draw from the
generators of their devices.

Shapes use B for rows, V for the vocabulary, K for the tokens kept.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_BYTES = 256 * 2**20
"""Most bytes of cumulative sums made at a time."""


def uniforms(seed: int, positions: int) -> npt.NDArray[np.float64]:
    """Return the numbers in [0, 1) that a row's tokens are drawn by, `[positions]`."""
    return np.random.default_rng(seed).random(positions)


def draw_tokens(logits_BV: Any, uniform_B: Any, temperature: float) -> Any:
    """Draw one token a row from `softmax(logits / temperature)`.

    Args:
        logits_BV: Raw logits, `[B, V]`, a torch tensor on any device.
        uniform_B: A number in [0, 1) for each row, `[B]`.
        temperature: Above 0.

    Returns:
        Token ids, `[B]` int64 on the device of the logits; of a row with NaN any.
    """
    uniform_B1 = torch.as_tensor(uniform_B, dtype=torch.float64)[:, None]
    return torch.cat([*_look_up(logits_BV, uniform_B1, temperature)]).squeeze(1)


def sample_top_k(logits_BV: Any, uniform_B: Any, top_k: int) -> tuple[Any, Any, Any]:
    """Return the tokens that K draws from each row's distribution find, as a signal has them.

    The draws are spread evenly (systematic sampling): of K probabilities as large as 1/K each, laid
    side by side in the order of token ids, the row's number says where in each to draw. So a token
    of probability p is found in K p draws, rounded down or up, and in K p on average, as with
    independent draws (Anshumann et al., arXiv 2503.16870) but for less noise.

    Args:
        logits_BV: Raw logits, `[B, V]` float32, on any device.
        uniform_B: A number in [0, 1) for each row, `[B]`.
        top_k: K, the draws.

    Returns:
        As `select_top_k`: ids `[B, K]` by descending number of draws, ties by ascending id; the
        logarithms of those numbers as logits, and that of K as logsumexp, so that their difference
        is the logarithm of the share. Places without a token are as `Signal` has them. Rows that
        hold NaN have a NaN logsumexp.
    """
    points_BK = torch.as_tensor(uniform_B, dtype=torch.float64)[:, None] + torch.arange(top_k)
    parts = []
    for tokens_BK in _look_up(logits_BV, points_BK / top_k, 1.0):
        is_first_BK = tokens_BK != tokens_BK.roll(1, dims=1)
        is_first_BK[:, 0] = True
        place_BK = is_first_BK.cumsum(dim=1) - 1
        counts_BK = torch.zeros_like(tokens_BK).scatter_add_(1, place_BK, torch.ones_like(place_BK))
        ids_BK = torch.zeros_like(tokens_BK).scatter_(1, place_BK, tokens_BK)
        counts_BK, order_BK = counts_BK.sort(dim=1, descending=True, stable=True)
        ids_BK = ids_BK.gather(1, order_BK)
        ids_BK = torch.where(counts_BK > 0, ids_BK, ids_BK[:, :1])
        parts.append((ids_BK.to(torch.int32), counts_BK.float().log()))
    ids, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    whole_B = logits_BV.logsumexp(dim=1)
    draws = torch.full_like(whole_B, math.log(top_k))
    return ids, logits, torch.where(whole_B.isfinite(), draws, torch.nan)


def _look_up(logits_BV: Any, points_BN: Any, temperature: float) -> Iterator[Any]:
    """Yield the tokens at points in [0, 1) of each row's cumulative sums, some rows at a time."""
    rows, last = max(1, _BYTES // (8 * logits_BV.shape[1])), logits_BV.shape[1] - 1
    points_BN = points_BN.to(logits_BV.device)
    for part_BV, part_BN in zip(logits_BV.split(rows), points_BN.split(rows), strict=True):
        below = (part_BV - part_BV.amax(dim=1, keepdim=True)).double()
        sums_BV = (below / temperature).exp_().cumsum(dim=1)
        found_BN = torch.searchsorted(sums_BV, part_BN * sums_BV[:, -1:], right=True)
        yield found_BN.clamp(max=last)
