"""`duet-distill membership`: how well each model tells forgotten texts from texts of their kind.

A text is a query with its answer as they are given. What a model learned as a conversation it
takes for new as plain text, and the other way round: so the form is a setting, and a base that was
trained on the texts shows whether a test in that form sees anything. A model that was never trained
on the forgotten texts separates the two sets by chance; what is far from that, above or below,
shows that it was (MUSE, arXiv 2407.06460).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from duet_unlearn.data.kits import find_kit
from duet_unlearn.data.models.folder import context_length, read_config
from duet_unlearn.data.queries import Query
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.answers import pad, rows_of_logits, run_batches
from duet_unlearn.evaluation.membership.config import MembershipConfig
from duet_unlearn.evaluation.membership.results import MembershipReport
from duet_unlearn.evaluation.membership.scores import SCORES, TextView
from duet_unlearn.evaluation.statistics import Scores
from duet_unlearn.evaluation.subjects import Subject, free_memory, open_subject
from duet_unlearn.evaluation.tasks import load_answered, spread
from duet_unlearn.progress import Progress


def measure_membership(config: MembershipConfig) -> MembershipReport:
    """Score every text with every model.

    Raises:
        ConfigurationError: The memory does not hold a batch.
        DataError: A source or a model cannot be used, a query has no answer, a text stands on both
            sides or is too long for a model.
    """
    # A kit's name stands for its holdout here, where it means the held-out queries elsewhere.
    kits = [(source, find_kit(source)) for source in config.holdout]
    others = [str(kit.holdout) if kit else source for source, kit in kits]
    forget, holdout = (
        spread(load_answered(sources, split="forget"), config.limit)
        for sources in (config.forget, others)
    )
    forgotten = {_text(query) for query in forget}
    for query in holdout:
        if _text(query) in forgotten:
            raise DataError(
                f"query {query.query_id} of {', '.join(config.holdout)}: is also one of --forget; "
                "a holdout has texts that no model was trained on"
            )
    queries = [*forget, *holdout]
    subjects = [
        open_subject(spec.model, {spec.label: False}, dtype=config.dtype) for spec in config.models
    ]
    encoded = [[_encode(subject, query, config.form) for query in queries] for subject in subjects]
    scores: dict[str, dict[str, Scores]] = {}
    texts = [(q.answer or "") if config.form == "answer" else _text(q) for q in queries]
    for subject, pairs in zip(subjects, encoded, strict=True):
        model = subject.load()
        with Progress(f"reading {subject.label}", len(queries), "texts") as progress:
            views = view_texts(
                model,
                texts,
                [ids for ids, _ in pairs],
                batch_size=config.batch_size,
                on_viewed=progress.update,
            )
        scores[subject.label] = {
            name: np.array(
                [score.score(view.last(n)) for view, (_, n) in zip(views, pairs, strict=True)]
            )
            for name, score in SCORES.items()
        }
        del model
        free_memory()
    return MembershipReport(
        config=config, forget=tuple(forget), holdout=tuple(holdout), scores=scores
    )


def _parts(query: Query) -> list[str]:
    return [*(turn["content"] for turn in query.messages), query.answer or ""]


def _text(query: Query) -> str:
    return "\n\n".join(_parts(query))


def _encode(subject: Subject, query: Query, form: str) -> tuple[list[int], int]:
    """Return the token ids of a text and how many of the last ones are scored."""
    renderer = subject.renderer
    answer = list(renderer.begun_ids(query.answer or ""))
    if form == "plain":
        ids = renderer.plain_ids(_parts(query))
    else:
        ids = [*renderer.student_ids(query.messages), *answer]
    limit = context_length(read_config(subject.folder))
    if len(ids) < 2 or (limit is not None and len(ids) > limit):
        raise DataError(
            f"query {query.query_id}: {len(ids)} tokens with its answer, expected 2 to "
            f"{limit or 'any number'} that {subject.label} reads; change it or leave it out"
        )
    # Nothing stands before the first token to predict it from.
    return ids, len(answer) if form == "answer" else len(ids) - 1


def view_texts(
    model: Any,
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    on_viewed: Callable[[int], object] = lambda _count: None,
) -> list[TextView]:
    """Return how a model takes each text, of two tokens or more.

    `on_viewed` is given the number of texts after each pass.

    Raises:
        ConfigurationError: The memory does not hold a text.
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
