"""Given responses as rows: a conversation's turns, and stretches of what is longer than a row.

A row holds tokens that stand before (`prompt_ids`) and tokens that are scored (`response_ids`), so
a stretch of a long text is a row like any other: what precedes it is read and not scored. Every
token is scored once, behind as much of its text as the teacher's context holds.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from duet_unlearn.data.models.fingerprint import sha256_json
from duet_unlearn.data.prompts import PromptRenderer
from duet_unlearn.data.queries import Given, Query, load_responses
from duet_unlearn.errors import DataError
from duet_unlearn.teacher_cache.format.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_given(source: str, scored: str) -> Iterator[Query]:
    """Yield what a source gives responses to, a query for each turn of the assistant's.

    What the assistant says before the user is no response: it stands in front of those.

    Args:
        source: See `load_responses`.
        scored: `assistant`, or `all` for whole conversations; see `Recipe.scored`.

    Raises:
        DataError: The source is unusable.
    """
    for query in load_responses(source):
        last, asked = len(query.messages), False
        for number, turn in enumerate(query.messages, start=1):
            asked |= turn["role"] == "user"
            if number == last:
                yield query
            elif turn["role"] == "assistant" and scored == "assistant" and asked:
                turns = query.messages[:number]
                yield replace(query, query_id=f"{query.query_id}#{number}", messages=turns)


def cut_given(
    queries: Iterable[Query],
    renderer: PromptRenderer,
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    context: int | None,
) -> list[Query]:
    """Return queries with the tokens of given responses, longer ones as several.

    Args:
        queries: Those whose last turn is the assistant's get tokens; others stay as they are.
        renderer: Makes the tokens.
        tokenizer: Shows a stretch as text.
        recipe: Says what is scored, and how many positions a row has at most.
        context: Tokens that the teacher reads, None where that has no limit.

    Raises:
        DataError: The chat template does not take a conversation, or nothing of one is scored.
    """
    rows: list[Query] = []
    longer = 0
    for query in queries:
        if query.messages[-1]["role"] != "assistant":
            rows.append(query)
            continue
        ids, start, stop = renderer.answered_ids(
            query.messages, recipe.eos_token_ids, every=recipe.scored == "all"
        )
        if stop <= start:
            text = query.messages[-1]["content"]
            raise DataError(
                f"{query.query_id}: {text[:40]!r} is one token, and a token is scored behind "
                "another; leave it out"
            )
        whole = stop - start <= recipe.positions and stop <= (context or stop)
        longer += not whole
        named = sha256_json(query.text)
        tokens = np.array(ids, np.int32)  # its rows are views: what they are read behind overlaps
        step = min(recipe.positions, (context or stop) - 1)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            given = Given(
                text=query.text,
                prompt_ids=tokens[max(0, end - (context or end)) : begin],
                response_ids=tokens[begin:end],
            )
            if whole:
                rows.append(replace(query, given=given))
                continue
            shown = str(tokenizer.decode(ids[begin:end]))
            # See `STRETCH`.
            text = json.dumps([f"tokens {begin} to {end - 1}", named, shown], ensure_ascii=False)
            # Only the first stretch repeats the turns.
            turns = query.messages if begin == start else ()
            name, given = f"{query.query_id}@{begin}", replace(given, text=text)
            rows.append(replace(query, query_id=name, messages=turns, given=given))
    if longer:
        logger.info(
            "%d texts are longer than %d positions or the context: they are cut into stretches",
            longer,
            recipe.positions,
        )
    return rows
