"""A suffix searched by greedy coordinate gradient (GCG: Zou et al., arXiv 2307.15043).

Each step draws some training queries, takes the gradient of their loss by the suffix's embeddings,
tries suffixes with one token exchanged for one that the gradient proposes, and keeps the best. Only
suffixes that a user can type count: as text they have to give the same tokens again. The paper has
500 steps of 512 candidates; the defaults are far fewer.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.distill.attacking.prompts import Prompt, render
from duet_unlearn.distill.attacking.soft_tokens import embed, soft_tokens
from duet_unlearn.distill.relearning.fine_tuning import answer_loss
from duet_unlearn.evaluation.answers import fits_memory, score_references
from duet_unlearn.evaluation.subjects import Subject

_PROPOSED = 64
"""Tokens that the gradient proposes for each place."""


class SuffixSearch:
    """The search for one model and row.

    Args:
        config: How many steps it takes (`suffix_steps`), how many training queries a step looks at
            (`suffix_queries`) and suffixes it tries (`candidates`), and the most prompts of a pass
            (`batch_size`); the seed decides all that is drawn.
        subject: Whose prompts.
        label: Which row of it.
        model: In evaluation mode, its weights frozen.
        prompts: What the suffix is trained on.
    """

    def __init__(
        self,
        config: AttackConfig,
        subject: Subject,
        label: str,
        model: Any,
        prompts: Sequence[Prompt],
    ) -> None:
        self._config, self._subject, self._label = config, subject, label
        self._model, self._prompts = model, prompts
        self._random = random.Random(config.seed)
        tokenizer = subject.tokenizer
        self._banned = sorted(
            {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
            | set(range(len(tokenizer), model.get_input_embeddings().weight.shape[0]))
        )
        self.ids = list(prompts[0].inserted)

    def run(self, on_step: Callable[[int], object] = lambda _count: None) -> str:
        """Search, and return the suffix.

        Raises:
            ConfigurationError: The memory does not hold a step.
        """
        count = min(self._config.suffix_queries, len(self._prompts))
        for _ in range(self._config.suffix_steps):
            batch = self._random.sample(list(self._prompts), count)
            tried = [self.ids, *self._propose(batch)]
            losses = self._losses(batch, tried)
            self.ids = tried[losses.index(min(losses))]
            on_step(1)
        return self._text(self.ids)

    def _propose(self, batch: Sequence[Prompt]) -> list[list[int]]:
        """Return suffixes with one token exchanged."""
        scores_NV = -self._gradient(batch)
        scores_NV[:, self._banned] = -float("inf")
        proposed_NK = scores_NV.topk(min(_PROPOSED, scores_NV.shape[1])).indices.tolist()
        found: list[list[int]] = []
        for _ in range(8 * self._config.candidates):  # most are typed otherwise, or drawn before
            at = self._random.randrange(len(self.ids))
            ids = [*self.ids]
            ids[at] = self._random.choice(proposed_NK[at])
            if ids != self.ids and ids not in found and self._can_be_typed(ids, batch[0]):
                found.append(ids)
            if len(found) == self._config.candidates:
                break
        return found

    def _gradient(self, batch: Sequence[Prompt]) -> Tensor:
        """Return the loss's gradient by the choice of each token, `[N, V]`."""
        vectors_ND = embed(self._model, self.ids).requires_grad_(True)
        with (
            fits_memory(f"the gradient of {len(batch)} queries"),
            soft_tokens(self._model, vectors_ND) as ids,
        ):
            loss: Any = answer_loss(self._model, [(p.holding(ids), p.answer) for p in batch])
            loss.backward()
        gradient = vectors_ND.grad
        if gradient is None:
            raise RuntimeError("the suffix has no gradient: the embedding's hook was not called")
        weight = self._model.get_input_embeddings().weight
        found: Tensor = gradient @ weight.detach().to(gradient).T
        return found

    def _losses(self, batch: Sequence[Prompt], tried: Sequence[Sequence[int]]) -> list[float]:
        """Return of each suffix the mean cross-entropy of the batch's answers, nats a token."""
        scored = score_references(
            self._model,
            [prompt.holding(ids) for ids in tried for prompt in batch],
            [prompt.answer for _ in tried for prompt in batch],
            batch_size=self._config.batch_size,
        )
        sums = [sum(row.log_probabilities) for row in scored]
        total, width = sum(len(prompt.answer) for prompt in batch), len(batch)
        return [-sum(sums[at : at + width]) / total for at in range(0, len(sums), width)]

    def _can_be_typed(self, ids: Sequence[int], prompt: Prompt) -> bool:
        text = self._text(ids)
        if not text.isprintable():
            return False
        return render(self._subject, self._label, prompt.query, text) == prompt.holding(ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._subject.tokenizer.decode(list(ids)))
