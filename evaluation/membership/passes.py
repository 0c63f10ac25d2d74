"""How likely a model finds texts, one forward pass a text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from duet_unlearn.evaluation.answers import pad, rows_of_logits, run_batches
from duet_unlearn.evaluation.membership.scores import TextView


def view_texts(
    model: Any,
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    on_viewed: Callable[[int], object] = lambda _count: None,
) -> list[TextView]:
    """Return how a model takes each text, of two tokens or more.

    `on_viewed` is given the number of texts after each pass. A ConfigurationError where the memory
    does not hold a text.
    """

    def view(batch: Sequence[int]) -> list[TextView]:
        return _view_batch(model, [texts[i] for i in batch], [token_ids[i] for i in batch])

    lengths = [len(ids) for ids in token_ids]
    rows = rows_of_logits(model, batch_size, max(lengths))
    return run_batches(view, lengths, batch_size=rows, on_done=on_viewed)


def _view_batch(
    model: Any, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> list[TextView]:
    ids_BT, mask_BT = pad(token_ids, model.device)
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    views = []
    for row, (text, ids) in enumerate(zip(texts, token_ids, strict=True)):
        # One row at a time: what follows holds three copies of its logits.
        logs_TV = logits_BTV[row, : len(ids) - 1].float().log_softmax(dim=-1)
        weights_TV = logs_TV.exp()
        finite_TV = logs_TV.clamp(min=-1e4)  # a token that cannot stand there weighs nothing
        mean_T = (weights_TV * finite_TV).sum(dim=-1)
        spread_T = (weights_TV * (finite_TV - mean_T[:, None]) ** 2).sum(dim=-1).sqrt()
        taken_T = finite_TV.gather(-1, ids_BT[row, 1 : len(ids), None])[:, 0]
        views.append(
            TextView(
                text=text,
                log_probabilities=taken_T.tolist(),
                means=mean_T.tolist(),
                deviations=spread_T.tolist(),
            )
        )
    return views
