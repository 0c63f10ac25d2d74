"""Draw tokens so that the same seed gives the same response on every engine.

A row's seed gives one number in [0, 1) a position, and that number picks a token from the
distribution's cumulative sums in the order of token ids. What is drawn depends on the row alone,
not on its batch, its engine or how often it was preempted; rounding can tip a draw only where the
number falls on the border of two tokens. Samplers of engines promise less: they draw from the
generators of their devices.

Shapes use B for rows, V for the vocabulary.
"""

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
    uniform_B1: Any = torch.as_tensor(uniform_B, dtype=torch.float64, device=logits_BV.device)[
        :, None
    ]
    rows, last = max(1, _BYTES // (8 * logits_BV.shape[1])), logits_BV.shape[1] - 1
    drawn = []
    for part_BV, part_B1 in zip(logits_BV.split(rows), uniform_B1.split(rows), strict=True):
        below = (part_BV - part_BV.amax(dim=1, keepdim=True)).double()
        sums_BV = (below / temperature).exp_().cumsum(dim=1)
        found_B1 = torch.searchsorted(sums_BV, part_B1 * sums_BV[:, -1:], right=True)
        drawn.append(found_B1.squeeze(1).clamp(max=last))
    return torch.cat(drawn)
