"""From draws of a cache to padded batches.

The layout of a row, `-` for padding:

    - - p p p r r -      prompt left padded, the teacher's own or given tokens right of it
          s s s          scored: the last prompt token and every response token but the last

All rows end their prompts in the same column, so the scored positions of the whole batch are the
last T columns and only they need to pass the head. Shapes: B rows, L columns, T positions,
K cached tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from duet_unlearn.data.messages import messages_from_text
from duet_unlearn.data.prompts import PromptRenderer
from duet_unlearn.data.shapes import Shape
from duet_unlearn.distill.batches.replay import JoinedRows
from duet_unlearn.distill.batches.sampler import PLAIN, Draw
from duet_unlearn.errors import DataError
from duet_unlearn.teacher_cache.format.schema import SPLITS
from duet_unlearn.teacher_cache.reader import CacheReader


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence with its target: T positions of K tokens."""

    name: str
    """Query id, and the view behind a slash; shown when something goes wrong."""
    split: int
    """Its place in `SPLITS`."""
    weight: float
    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    logsumexp: npt.NDArray[np.float32]


class CacheDataset(Dataset[Example]):
    """The sequences that draws stand for.

    Args:
        reader: The cache, or several.
        top_k: Keep the strongest K tokens of each position; None keeps all.
        positions: Keep the first N positions; None keeps all.
        views: Shapes that draws refer to by index.
        renderer: The student's tokenizer and chat template; needed with views.
        max_length: Longest sequence the student reads, or None.
        targets: Row that holds the target of a row behind a view, by row and view; the row's own
            where there is none.
    """

    def __init__(
        self,
        reader: CacheReader | JoinedRows,
        *,
        top_k: int | None = None,
        positions: int | None = None,
        views: Sequence[Shape] = (),
        renderer: PromptRenderer | None = None,
        max_length: int | None = None,
        targets: Mapping[tuple[int, int], int] | None = None,
    ) -> None:
        if views and renderer is None:
            raise ValueError("views need a renderer")
        self.reader = reader
        self.top_k = top_k
        self.positions = positions
        self.views = tuple(views)
        self.renderer = renderer
        self.max_length = max_length
        self.targets = targets or {}

    def __len__(self) -> int:
        return self.reader.num_rows

    def __getitem__(self, draw: Draw) -> Example:
        row = self.reader.row(draw.row)
        name, prompt_ids = row.query_id, row.prompt_ids
        # A row of `train` has no other shape.
        in_view = draw.view != PLAIN and row.split != "train"
        if in_view and self.renderer is not None:
            view = self.views[draw.view]
            name = f"{row.query_id}/{view.name}"
            if (target := self.targets.get((draw.row, draw.view))) is not None:
                # What the plain base says in this view, with the prompt it was asked by.
                row = self.reader.row(target)
                prompt_ids = row.prompt_ids
            else:
                messages = messages_from_text(row.query)
                prompt_ids = np.array(view.render(messages, self.renderer), np.int32)
        scored, kept = slice(self.positions), slice(self.top_k)
        example = Example(
            name=name,
            split=SPLITS.index(row.split),
            weight=draw.weight,
            prompt_ids=prompt_ids,
            response_ids=row.response_ids[scored],
            token_ids=row.token_ids[scored, kept],
            logits=row.logits[scored, kept],
            logsumexp=row.logsumexp[scored],
        )
        self._check_length(example)
        return example

    def _check_length(self, example: Example) -> None:
        length = len(example.prompt_ids) + len(example.response_ids) - 1
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"query {example.name}: {length} tokens, but the student reads at most "
                f"{self.max_length}; leave the query or its view out, or train on fewer positions"
            )


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Pad examples into one batch.

    Returns:
        `input_ids`, `attention_mask`, `position_ids`: `[B, L]` int64;
        `response_ids` `[B, T]` and `token_ids` `[B, T, K]` int64; `teacher_logits` `[B, T, K]` and
        `teacher_logsumexp` `[B, T]` float32; `position_mask` `[B, T]` bool; `weight` `[B]` float32;
        `split` `[B]` int64; `names`: B strings.
    """
    rows = len(examples)
    prompt_width = max(len(example.prompt_ids) for example in examples)
    positions = max(len(example.response_ids) for example in examples)
    # Of caches made with top-p, no more places than a position of this batch fills.
    top_k = max(int((example.logits > -np.inf).sum(axis=1).max()) for example in examples)
    # Id 0 pads: every model has it, and the attention mask hides it.
    input_ids = np.zeros((rows, prompt_width + positions - 1), np.int64)
    attention_mask = np.zeros_like(input_ids)
    response_ids = np.zeros((rows, positions), np.int64)
    token_ids = np.zeros((rows, positions, top_k), np.int64)
    teacher_logits = np.zeros((rows, positions, top_k), np.float32)
    teacher_logsumexp = np.zeros((rows, positions), np.float32)
    position_mask = np.zeros((rows, positions), np.bool_)
    for i, example in enumerate(examples):
        # The last response token is only ever predicted, never read.
        sequence = np.concatenate([example.prompt_ids, example.response_ids[:-1]])
        start, scored = prompt_width - len(example.prompt_ids), len(example.response_ids)
        input_ids[i, start : start + len(sequence)] = sequence
        attention_mask[i, start : start + len(sequence)] = 1
        response_ids[i, :scored] = example.response_ids
        token_ids[i, :scored] = example.token_ids[:, :top_k]
        teacher_logits[i, :scored] = example.logits[:, :top_k]
        teacher_logsumexp[i, :scored] = example.logsumexp
        position_mask[i, :scored] = True
    arrays = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(axis=1) - 1).clip(min=0),
        "response_ids": response_ids,
        "token_ids": token_ids,
        "teacher_logits": teacher_logits,
        "teacher_logsumexp": teacher_logsumexp,
        "position_mask": position_mask,
        "weight": np.array([example.weight for example in examples], np.float32),
        "split": np.array([example.split for example in examples], np.int64),
    }
    batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**batch, "names": [example.name for example in examples]}
