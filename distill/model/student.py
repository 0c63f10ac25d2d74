"""The student: find it, and make sure that a cache's token ids mean to it what they say."""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from duet_unlearn.data.messages import STRETCH, messages_from_text, query_of_row, split_view
from duet_unlearn.data.models.fingerprint import (
    chat_template_fingerprint,
    config_fingerprint,
    vocabulary_fingerprint,
    weights_fingerprint,
)
from duet_unlearn.data.models.folder import (
    context_length,
    head_width,
    read_config,
    resolve_model_folder,
    stored_dtype,
)
from duet_unlearn.data.shapes import Shape
from duet_unlearn.errors import DataError, MismatchError
from duet_unlearn.files import user_path
from duet_unlearn.teacher_cache.reader import CacheReader

if TYPE_CHECKING:
    from duet_unlearn.data.prompts import PromptRenderer

logger = logging.getLogger(__name__)

# Rows that are tokenised again to compare. They are spread over a few shards alone: those of a
# remote cache have to be fetched before training begins.
_COMPARED_ROWS = 64
_COMPARED_SHARDS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A model folder that training starts from, before its weights are loaded."""

    name: str
    """As the user gave it."""
    folder: Path
    hidden_size: int
    head_width: int
    max_length: int | None
    """Longest sequence it reads in tokens, or None where its configuration names none."""
    stored_dtype: str
    weights: str
    """Fingerprint of the weights."""
    config: str
    """Fingerprint of the configuration: its entries that decide a logit."""
    chat_template: str | None
    """Fingerprint of the chat template; None where it has none."""
    licence: str | None
    """What its model card says of its licence."""

    @property
    def identity(self) -> dict[str, str | None]:
        """What of the base decides the student, by content."""
        return {"weights": self.weights, "config": self.config, "template": self.chat_template}


def open_student(model: str) -> Student:
    """Find a model folder and read everything but its weights.

    Raises:
        DataError: The folder or hub model is missing, or not a language model.
    """
    user_path(model, "student")  # `~nobody` is named as such
    folder = resolve_model_folder(model)
    return describe_student(model, folder, weights=weights_fingerprint(folder))


def describe_student(model: str, folder: Path, *, weights: str) -> Student:
    """Describe a model by what its folder holds beside the weights.

    Args:
        model: As the user gave it.
        folder: Where it is; a config.json is enough.
        weights: Fingerprint of its weights; empty where nobody compares them.

    Raises:
        DataError: The configuration is not a language model's.
    """
    config = read_config(folder)
    hidden_size = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise DataError(f"model {folder}: config.json names no hidden_size; expected a number")
    return Student(
        name=model,
        folder=folder,
        hidden_size=hidden_size,
        head_width=head_width(config),
        max_length=context_length(config),
        stored_dtype=stored_dtype(config),
        weights=weights,
        config=config_fingerprint(folder),
        chat_template=chat_template_fingerprint(folder),
        licence=read_licence(folder),
    )


def read_licence(folder: Path) -> str | None:
    """Return the licence that a model folder's card names in its header, or None."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, yaml.YAMLError, IndexError, RecursionError):
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) and "\n" not in found else None


def check_cache_fits(student: Student, renderer: "PromptRenderer", reader: CacheReader) -> None:
    """Refuse a cache whose token ids are not the student's.

    Raises:
        MismatchError: The vocabularies differ, the same query gives other ids, or the student's
            head is too narrow for the cached ids.
    """
    recipe = reader.manifest.recipe
    if recipe.top_k > student.head_width:  # before anything of that width is decoded
        raise MismatchError(
            f"student {student.name}: its head gives {student.head_width} logits, but the cache "
            f"keeps {recipe.top_k} at a position; take a student with the teacher's vocabulary"
        )
    same_vocabulary = vocabulary_fingerprint(student.folder) == recipe.vocabulary
    same_template = chat_template_fingerprint(student.folder) == recipe.chat_template
    difference = _first_difference(renderer, reader)
    if not same_vocabulary:
        shown = difference or "the queries that were compared agree, so rarer tokens differ"
        raise MismatchError(
            f"student {student.name}: its tokens are not those of cache {reader.folder} ({shown}); "
            "build a cache with a teacher that shares the student's tokenizer"
        )
    if not same_template:
        logger.warning(
            "student %s has another chat template than the cache was built with: it is trained on "
            "the cache's prompts%s",
            student.name,
            f" ({difference})" if difference else "",
        )
    elif difference:
        raise MismatchError(
            f"student {student.name}: it splits text into other tokens than cache {reader.folder} "
            f"({difference}); build a cache with a teacher that shares the student's tokenizer"
        )
    _check_head(student, reader)
    if student.weights not in ("", recipe.weights):
        logger.info("the student does not start from the teacher's weights")


def _first_difference(renderer: "PromptRenderer", reader: CacheReader) -> str | None:
    for index in _compared_rows(reader):
        row = reader.row(index)
        cached = row.prompt_ids.tolist()
        view, query = split_view(row.query)[0], query_of_row(row.query)
        messages = messages_from_text(query)
        if row.split == "train" and query.startswith(STRETCH):
            continue  # its text is not all that its tokens come from
        if view is not None:
            found = Shape(name="view", text=view).render(messages, renderer)
        elif messages[-1]["role"] == "assistant":
            cached += row.response_ids.tolist()
            recipe = reader.manifest.recipe
            found, _, _ = renderer.answered_ids(
                messages, recipe.eos_token_ids, every=recipe.scored == "all"
            )
            found = found[: len(cached)]  # a template may go on behind a turn
        else:
            found = renderer.student_ids(messages)
        pairs = itertools.zip_longest(cached, found, fillvalue="none")
        for at, (theirs, ours) in enumerate(pairs):
            if theirs != ours:
                return f"query {row.query_id}, token {at}: {theirs} in the cache, {ours} here"
    return None


def _compared_rows(reader: CacheReader) -> list[int]:
    sizes = [shard.num_rows for shard in reader.manifest.shards]
    starts = np.cumsum([0, *sizes])
    shards = _spread(0, len(sizes), _COMPARED_SHARDS)
    each = -(-_COMPARED_ROWS // len(shards))
    return [row for i in shards for row in _spread(int(starts[i]), int(starts[i + 1]), each)]


def _spread(start: int, stop: int, count: int) -> list[int]:
    """Return at most `count` integers spread evenly over a range, its ends among them."""
    count = min(count, stop - start)
    spread: list[int] = np.linspace(start, stop - 1, count, dtype=np.int64).tolist()
    return spread


def _check_head(student: Student, reader: CacheReader) -> None:
    # Padding rows make heads of one tokenizer differ in width, so a narrower head than the
    # teacher's is only wrong if the cache holds an id beyond it.
    recipe = reader.manifest.recipe
    if student.head_width >= recipe.vocab_size:
        return
    for index in range(len(reader.row_groups)):
        group = reader.group(index)
        largest = max(int(ids.max(initial=0)) for ids in (group.token_ids, group.response_ids))
        if largest >= student.head_width:
            raise MismatchError(
                f"student {student.name}: its head gives {student.head_width} logits, but the "
                f"cache holds token id {largest}; take a student with the teacher's vocabulary"
            )
