"""transformers' Trainer with the cache's batches and losses.

What is replaced is what the Trainer would decide by itself: the order of the data (its samplers
depend on the number of processes), the scaling of the loss (every row carries its share of the
step's loss, so accumulation and processes add up exactly), and its prints on standard output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from duet_unlearn.distill.dataset import CacheDataset, Example, collate
from duet_unlearn.distill.losses import Loss, row_means
from duet_unlearn.distill.sampler import StepSampler
from duet_unlearn.distill.sparse_head import StudentScores
from duet_unlearn.errors import ConfigurationError

SPLITS = ("forget", "retain")


class StepLoader(DataLoader[Example]):
    """The forward passes of this process, in the sampler's order for the Trainer's epoch."""

    def __init__(self, dataset: CacheDataset, sampler: StepSampler) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate)
        self._steps = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the Trainer calls this before it iterates."""
        self._steps.set_epoch(epoch)


class DuetTrainer(Trainer):
    """Trainer of one run.

    Args:
        model: The student.
        args: The Trainer's arguments; accumulation is theirs, the batch size the sampler's.
        dataset: The cache's sequences.
        make_sampler: Called with process index and number of processes.
        loss: Distance of the student to the teacher at each position.
        callbacks: Further callbacks.
    """

    # Read by some versions only; the others come to the same by their defaults.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        dataset: CacheDataset,
        make_sampler: Callable[[int, int], StepSampler],
        loss: Loss,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, callbacks=callbacks)
        self.remove_callback(PrinterCallback)  # it prints to standard output
        self._student = model
        self._dataset = dataset
        self._make_sampler = make_sampler
        self._loss = loss
        self._student_scores = StudentScores(model, tail=loss.tail)
        # Sum of row losses and number of rows, a split, since the last log line.
        self._split_totals = torch.zeros(2, len(SPLITS), device=args.device)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's passes; accelerate must not shard them a second time."""
        sampler = self._make_sampler(self.accelerator.process_index, self.accelerator.num_processes)
        return StepLoader(self._dataset, sampler)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002
    ) -> Any:
        """Return this pass's part of the step's loss, a scalar.

        Raises:
            ConfigurationError: The loss is not finite.
        """
        scores_BTS = self._student_scores(model, inputs)
        losses_BT = self._loss(scores_BTS, inputs["teacher_logits"], inputs["teacher_logsumexp"])
        losses_B = row_means(losses_BT, inputs["position_mask"])
        self._check_finite(losses_B, inputs)
        self._count(losses_B.detach(), inputs)
        # Weights sum to 1 over all passes and processes. The Trainer divides by the passes and
        # averages gradients over the processes, so both are multiplied in here.
        scale = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        loss = (losses_B * inputs["weight"]).sum() * scale
        return (loss, scores_BTS) if return_outputs else loss

    def _check_finite(self, losses_B: Tensor, inputs: dict[str, Any]) -> None:
        finite = torch.isfinite(losses_B)
        if bool(finite.all()):
            return
        bad = [name for name, ok in zip(inputs["names"], finite.tolist(), strict=True) if not ok]
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise self._diverged(
            f"the loss is not finite at step {self.state.global_step + 1} (queries: {shown})"
        )

    def _diverged(self, what: str) -> ConfigurationError:
        kept = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        state = f"; its state of step {kept.rpartition('-')[2]} is kept in {kept}" if kept else ""
        return ConfigurationError(
            f"{what}; learning rate {self.args.learning_rate:g} is too high for this student or "
            f"its weights are damaged: lower --learning-rate{state}"
        )

    def check_weights(self) -> None:
        """Make sure that there is something to keep: a loss tells of a bad step one step later.

        Raises:
            ConfigurationError: A trained weight is not finite.
        """
        for name, parameter in self._student.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise self._diverged(
                    f"weights are not finite after step {self.state.global_step} ({name})"
                )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()  # the checkpoint before is removed only for a sound one
        super()._save_checkpoint(model, trial)

    def _count(self, losses_B: Tensor, inputs: dict[str, Any]) -> None:
        counted = (inputs["weight"] > 0).to(losses_B.dtype)
        for code in range(len(SPLITS)):
            of_split = counted * (inputs["split"] == code)
            self._split_totals[0, code] += (losses_B * of_split).sum()
            self._split_totals[1, code] += of_split.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each split's mean loss since the last log line."""
        if "loss" in logs:
            totals = self.accelerator.reduce(self._split_totals, reduction="sum")
            for code, split in enumerate(SPLITS):
                total, count = totals[:, code].tolist()
                if count:
                    logs[f"loss_{split}"] = total / count
            self._split_totals = torch.zeros_like(self._split_totals)
        super().log(logs, start_time)
