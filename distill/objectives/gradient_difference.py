"""Gradient difference: unlearn answers by ascent on them, and hold others by descent.

With NLL the mean negative log-likelihood of an answer's tokens and of the end behind it,

    loss = NLL(retain) - NLL(forget)

averaged over the rows of a step (Liu, Liu, Stone, 2022; TOFU, Maini et al., arXiv 2401.06121). It
needs answers and no teacher, and is the baseline that methods are compared with. The loss has no
lower bound: trained for long enough, a student gives up its language with the answers, so
evaluate on the way and keep few epochs.

An answer is one cached token a position, so the batches and the head are those of a cache with
K = 1: with the logit of the answer's token and the logsumexp of all others, the NLL of the token
is `softplus(others - token)`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.utils.data import Dataset

from duet_unlearn.data.kits import refuse_kit
from duet_unlearn.data.models.folder import eos_token_ids
from duet_unlearn.data.queries import Query
from duet_unlearn.distill.batches.dataset import Example, collate
from duet_unlearn.distill.batches.sampler import FORGET, Draw
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.losses import row_means
from duet_unlearn.distill.model.sparse_head import StudentScores
from duet_unlearn.distill.model.student import Student
from duet_unlearn.distill.objectives.base import Order, Story
from duet_unlearn.distill.objectives.duet import warn_of_trained
from duet_unlearn.errors import DataError
from duet_unlearn.evaluation.tasks import load_answered
from duet_unlearn.teacher_cache.format.schema import SPLITS

if TYPE_CHECKING:
    from duet_unlearn.data.prompts import PromptRenderer


class GradientDifference:
    """Negative log-likelihood of answers, its sign turned for what is to be forgotten.

    Args:
        config: The run, with `forget` and `retain`.
        student: What is trained.

    Raises:
        DataError: A query file is missing or malformed, a query has no answer, or a source is a
            query kit.
    """

    dataset: "AnswerDataset"
    """The pairs of query and answer, once prepared."""

    def __init__(self, config: RunConfig, student: Student) -> None:
        self._student = student
        for source in (*config.forget, *config.retain):
            refuse_kit(source)
        self._queries = [
            query
            for split in ("forget", "retain")
            for query in load_answered(getattr(config, split), split=split)
        ]
        codes = np.array([SPLITS.index(query.split) for query in self._queries], np.uint8)
        self.order = Order(splits=codes, row_groups=[range(len(codes))])
        pairs = [[query.split, query.text, query.answer] for query in self._queries]
        digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        self.identity = {"answers": f"sha256:{digest}"}
        self.settings: dict[str, Any] = {}

    def prepare(self, renderer: "PromptRenderer", queries: set[str] | None = None) -> None:
        """Render all pairs; see `Objective.prepare`."""
        self.dataset = AnswerDataset(self._queries, renderer, self._student)
        if queries:
            warn_of_trained(queries, (query.text for query in self._queries))

    def attach(self, model: nn.Module) -> None:
        """Find the student's head."""
        self._scores = StudentScores(model, tail=True)

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Pad pairs into one batch."""
        return collate(examples)

    def row_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the NLL of each answer in nats a token, `[B]`, negative where it is to go."""
        token_BT, others_BT = self._scores(model, batch).unbind(dim=-1)
        nll_B = row_means(F.softplus(others_BT - token_BT), batch["position_mask"])
        signed_B: Tensor = nll_B * (1.0 - 2.0 * (batch["split"] == FORGET).to(nll_B.dtype))
        return signed_B

    def story(self) -> Story:
        """Say what the student was trained for."""
        return Story(
            summary=(
                "after unlearning by gradient difference: trained to make the reference answers "
                "of forget queries less likely and those of retain queries more likely."
            ),
            tags=("unlearning", "gradient-difference"),
            facts={"loss": "NLL of retain answers less NLL of forget answers"},
            record={**self.identity, "view_families": []},
        )


class AnswerDataset(Dataset[Example]):
    """Queries with their answers as sequences of one target token a position.

    Args:
        queries: With answers.
        renderer: The student's.
        student: Whose end of sequence closes an answer.

    Raises:
        DataError: A pair is too long for the student.
    """

    def __init__(
        self, queries: Sequence[Query], renderer: "PromptRenderer", student: Student
    ) -> None:
        ends = renderer.closing_ids(eos_token_ids(student.folder))
        self._examples: list[Example] = []
        for query in queries:
            prompt = np.array(renderer.student_ids(query.messages), np.int32)
            answer = np.array([*renderer.begun_ids(query.answer or ""), *ends], np.int32)
            length = len(prompt) + len(answer) - 1
            if student.max_length is not None and length > student.max_length:
                raise DataError(
                    f"query {query.query_id}: {length} tokens with its answer, but the student "
                    f"reads at most {student.max_length}; shorten it or leave it out"
                )
            nothing = np.zeros(len(answer), np.float32)
            self._examples.append(
                Example(
                    name=query.query_id,
                    split=SPLITS.index(query.split),
                    weight=0.0,
                    prompt_ids=prompt,
                    response_ids=answer,
                    token_ids=answer[:, None],
                    logits=nothing[:, None],
                    logsumexp=nothing,
                )
            )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, draw: Draw) -> Example:
        return dataclasses.replace(self._examples[draw.row], weight=draw.weight)
