"""A signal: what the teacher says at the positions of one query.

Shapes use T for positions and K for the Top-K tokens kept at each.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """The teacher's signal for one query, T >= 1 positions."""

    response_ids: npt.NDArray[np.int32]
    """Greedy, drawn or given tokens, `[T]`. Where T is smaller than the positions asked for, the
    last of those that were decoded is an end-of-sequence token."""
    token_ids: npt.NDArray[np.int32]
    """Top-K token ids by descending logit, ties by ascending id, `[T, K]`."""
    logits: npt.NDArray[np.float32]
    """Raw logits of those tokens: before softmax, temperature and penalties, `[T, K]`."""
    logsumexp: npt.NDArray[np.float32]
    """Logsumexp over the full vocabulary in nats, `[T]`: `logits - logsumexp` are
    log-probabilities."""
