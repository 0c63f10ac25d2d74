"""The loss on a held-out cache, taken in the middle of a training."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from duet_unlearn.data.messages import asked_text, split_view
from duet_unlearn.distill.batches.dataset import CacheDataset, collate
from duet_unlearn.distill.batches.sampler import PLAIN, Draw
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import Student, check_cache_fits
from duet_unlearn.distill.objectives.duet import check_loss_fits
from duet_unlearn.distill.training.checkpoint_selection import HeldOutLoss, LowestLoss
from duet_unlearn.distill.training.held_out import undisturbed
from duet_unlearn.evaluation.tasks import spread
from duet_unlearn.teacher_cache.reader import CacheReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duet_unlearn.data.prompts import PromptRenderer
    from duet_unlearn.distill.objectives.duet import Duet


class HeldOutRows:
    """The rows of a held-out cache; those in views are left out.

    Args:
        config: The run, every `auto` replaced.
        objective: Whose loss is taken, at every position that it would train on.

    Raises:
        CacheError: The cache is unfinished or damaged.
        ConfigurationError: It holds other than what the loss compares.
    """

    as_saved = False  # the loss is that which training lowers

    def __init__(self, config: RunConfig, objective: "Duet") -> None:
        self._reader = reader = CacheReader.open(str(config.eval_cache))
        recipe = reader.manifest.recipe
        # Draws count together: of them, all are taken unless the user asks for fewer.
        top_k = config.top_k if recipe.keep == "strongest" else objective.asked_top_k
        check_loss_fits(config, str(config.eval_cache), recipe, top_k)
        self._objective = objective
        self._batch = max(1, int(config.batch_size) // config.gradient_accumulation_steps)
        texts = [text for _, _, text in reader.identities()]
        rows = [row for row, text in enumerate(texts) if split_view(text)[0] is None]
        self._rows = spread(rows, config.eval_limit)
        self.rule = LowestLoss(patience=config.early_stopping_patience)
        self.fingerprint = reader.manifest.digest
        self.texts = {asked_text(texts[row]) for row in self._rows}
        """What is asked, to be warned of what is trained on."""
        self._dataset = CacheDataset(reader, top_k=top_k, positions=config.positions)

    def prepare(
        self, student: Student, renderer: "PromptRenderer", tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        """Check that the cache's tokens are the student's.

        Raises:
            MismatchError: They are not.
        """
        del tokenizer
        check_cache_fits(student, renderer, self._reader)
        self._dataset.max_length = student.max_length

    def measure(
        self, model: "PreTrainedModel", step: int, *, process: int = 0, processes: int = 1
    ) -> HeldOutLoss:
        """Take the loss of every row; arguments and sharing are those of `HeldOut.measure`."""
        import torch

        mine, found = self._rows[process::processes], []
        with undisturbed(model), torch.no_grad():
            for start in range(0, len(mine), self._batch):
                draws = [Draw(row, PLAIN, 0.0) for row in mine[start : start + self._batch]]
                batch: dict[str, Any] = collate([self._dataset[draw] for draw in draws])
                tensors = {k: v.to(model.device) for k, v in batch.items() if k != "names"}
                losses = self._objective.held_out_losses(model, tensors)
                found += torch.stack(losses, dim=-1).double().tolist()
        if processes > 1:
            from accelerate.utils import gather_object  # type: ignore[import-untyped]

            found = gather_object(found)
        # Exact sums do not depend on the order in which processes give theirs.
        loss, cross_entropy = (math.fsum(column) / len(found) for column in np.array(found).T)
        return HeldOutLoss(step=step, loss=loss, cross_entropy=cross_entropy)
