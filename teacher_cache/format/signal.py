"""A signal: what the teacher says at the positions of one query.

Shapes use T for positions and K for the Top-K tokens kept at each.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """The teacher's signal for one query, T >= 1 positions."""

    response_ids: npt.NDArray[np.int32]
    """Greedy, drawn or given tokens, `[T]`. Where T is smaller than the positions asked for, the
    last of those that were decoded is an end-of-sequence token."""
    token_ids: npt.NDArray[np.int32]
    """Top-K token ids by descending logit, ties by ascending id, `[T, K]`. Where a position has
    fewer than K tokens, its first id again stands in the other places."""
    logits: npt.NDArray[np.float32]
    """Raw logits of those tokens: before softmax, temperature and penalties, `[T, K]`; minus
    infinity in places without a token. Of tokens that were drawn, the logarithm of how often."""
    logsumexp: npt.NDArray[np.float32]
    """Logsumexp over the full vocabulary in nats, `[T]`: `logits - logsumexp` are
    log-probabilities. Of tokens that were drawn, the logarithm of the number of draws."""


def keep_mass(signal: Signal, top_p: float) -> Signal:
    """Keep at each position the fewest of its strongest tokens that hold a share of all mass.

    Args:
        signal: Of K tokens a position.
        top_p: The share, of the distribution over the full vocabulary; where the K hold less, all
            of them stay.
    """
    log_TK = signal.logits.astype(np.float64) - signal.logsumexp[:, None]
    stronger_TK = np.exp(log_TK).cumsum(axis=1)[:, :-1]
    kept_TK = np.pad(stronger_TK < top_p, ((0, 0), (1, 0)), constant_values=True)
    return replace(
        signal,
        token_ids=np.where(kept_TK, signal.token_ids, signal.token_ids[:, :1]),
        logits=np.where(kept_TK, signal.logits, np.float32(-np.inf)),
    )
