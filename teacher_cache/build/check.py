"""How well the prefix steers the teacher, on a sample of the queries, before it runs over them all.

The numbers are those of `duet-cache tune`: what comes back of the base's own answers. The answers
themselves are not kept, because what is to be forgotten does not belong into a cache.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.prompts import PromptRenderer
from duet_unlearn.data.queries import Query
from duet_unlearn.progress import Progress
from duet_unlearn.teacher_cache.build.teacher import Teacher
from duet_unlearn.teacher_cache.steering import (
    FIFTH,
    NOTHING_TOLD,
    POINTS,
    Asked,
    Steering,
    draw,
    recall_of,
    score,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAMPLE = 32
"""Queries of each split that are asked."""
SEED = 0
_SHOWN = 80


def check_teacher(
    teacher: Teacher,
    queries: Sequence[Query],
    renderer: PromptRenderer,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    retain_prefix: bool,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Answer a seeded sample behind the prefix and without it, and warn of a bad teacher.

    Args:
        teacher: Answers.
        queries: All queries of the cache.
        renderer: Makes the prompts.
        tokenizer: Decodes the answers.
        retain_prefix: Whether the prefix stands in front of retain queries; where it does not,
            their signals are the base's own and there is nothing to ask.
        max_new_tokens: Longest answer in tokens.

    Returns:
        Names and numbers for the manifest, in points; see `Steering`.
    """
    splits = ("forget", "retain") if retain_prefix else ("forget",)
    asked = [
        query
        for split in splits
        for query in draw(
            [q for q in queries if q.split == split and q.view is None], SAMPLE, seed=SEED
        )
    ]
    prompts = [renderer.student_ids(query.messages) for query in asked]
    prompts += [renderer.teacher_ids(query.messages) for query in asked]
    said = [""] * len(prompts)
    with Progress("check", len(prompts), "answers") as progress:
        for index, ids in teacher.responses(list(enumerate(prompts)), max_new_tokens):
            said[index] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            progress.update()
    answers = list(zip(asked, said[: len(asked)], said[len(asked) :], strict=True))
    compared = {split: [entry for entry in answers if entry[0].split == split] for split in splits}
    scores = {split: score(entries) for split, entries in compared.items()}
    _warn(scores, compared)
    return {
        f"{split}_{name}": value
        for split, found in scores.items()
        if found.queries
        for name, value in found.to_json().items()
    }


def _warn(scores: Mapping[str, Steering], compared: Mapping[str, Sequence[Asked]]) -> None:
    """Log what makes a teacher a bad one, with its worst example and what to try."""
    forget, retain = scores["forget"], scores.get("retain")
    if compared["forget"] and not forget.queries:
        logger.warning("%s", NOTHING_TOLD)
    if forget.queries and forget.recall > FIFTH:
        logger.warning(
            "this teacher does not forget: behind the prefix %.0f%% of the base's answers to %d "
            "forget queries come back, for example %s; measure other wordings and places with "
            "duet-cache tune, and give what it finds to --prefix-from",
            forget.recall,
            forget.queries,
            _example(max(compared["forget"], key=lambda entry: recall_of(entry) or 0.0)),
        )
    if retain is not None and retain.queries and retain.recall < POINTS - FIFTH:
        logger.warning(
            "this teacher does not keep: behind the prefix %.0f%% of the base's answers to %d "
            "retain queries come back, for example %s; try --no-retain-prefix, which takes the "
            "base's own signals there, or another prefix (duet-cache tune)",
            retain.recall,
            retain.queries,
            _example(min(compared["retain"], key=_kept)),
        )


def _kept(asked: Asked) -> float:
    recall = recall_of(asked)
    return 1.0 if recall is None else recall


def _example(asked: Asked) -> str:
    query, base, prefixed = (
        " ".join(text.split())[:_SHOWN] for text in (asked[0].text, *asked[1:])
    )
    return f"{query!r} gives {prefixed!r}, without the prefix {base!r}"
