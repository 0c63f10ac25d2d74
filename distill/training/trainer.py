"""transformers' Trainer with an objective's batches and losses.

What is replaced is what the Trainer would decide by itself: the order of the data (its samplers
depend on the number of processes), the scaling of the loss (every row carries its share of the
step's loss, so accumulation and processes add up exactly), and its prints on standard output.
"""

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from duet_unlearn.distill.batches.sampler import StepSampler, sampler_of
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.objectives.base import Objective
from duet_unlearn.distill.training.callbacks import Schedule
from duet_unlearn.distill.training.checkpoint_selection import (
    Evaluation,
    HeldOutLoss,
    evaluations_of,
    metrics_of,
)
from duet_unlearn.errors import ConfigurationError, OutputError, first_line, some
from duet_unlearn.files import write_error
from duet_unlearn.teacher_cache.format.schema import SPLITS

if TYPE_CHECKING:
    from duet_unlearn.distill.training.held_out import HeldOut
    from duet_unlearn.distill.training.held_out_rows import HeldOutRows

logger = logging.getLogger(__name__)


class StepLoader(DataLoader[Any]):
    """The forward passes of this process, in the sampler's order for the Trainer's epoch."""

    def __init__(self, objective: Objective, sampler: StepSampler) -> None:
        super().__init__(objective.dataset, batch_sampler=sampler, collate_fn=objective.collate)
        self._steps = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the Trainer calls this before it iterates."""
        self._steps.set_epoch(epoch)


class DuetTrainer(Trainer):
    """Trainer of one run.

    Args:
        config: The run, every `auto` replaced.
        model: The student.
        args: The Trainer's arguments; accumulation is theirs, the batch size the sampler's.
        objective: Takes hold of the model here.
        callbacks: Further callbacks.
        held_out: What `evaluate` asks; its rule says which evaluated step is the best, whose
            checkpoint is then kept where the run selects the best.
    """

    # Read by some versions only; the others come to the same by their defaults.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        config: RunConfig,
        model: PreTrainedModel,
        args: TrainingArguments,
        objective: Objective,
        callbacks: list[TrainerCallback],
        held_out: "HeldOut | HeldOutRows | None" = None,
    ) -> None:
        self.schedule = Schedule(self, config.eval_steps, held_out.rule if held_out else None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=objective.dataset,
            callbacks=[self.schedule, *callbacks],
        )
        self.remove_callback(PrinterCallback)  # it prints to standard output
        self.student = model
        """Not wrapped for several processes."""
        self._config = config
        self._objective = objective
        self._held_out = held_out
        objective.attach(model)
        # Sum of row losses and number of rows, a split, since the last log line.
        self._split_totals = torch.zeros(2, len(SPLITS), device=args.device)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's passes; accelerate must not shard them a second time."""
        sampler = sampler_of(
            self._objective.order,
            self._config,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        return StepLoader(self._objective, sampler)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule; a single step has no warm-up, whose first rate is 0."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

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
        losses_B = self._objective.row_losses(model, inputs)
        self._check_finite(losses_B, inputs)
        self._count(losses_B.detach(), inputs)
        # Weights sum to 1 over all passes and processes. The Trainer divides by the passes and
        # averages gradients over the processes, so both are multiplied in here.
        scale = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        loss = (losses_B * inputs["weight"]).sum() * scale
        return (loss, {"losses": losses_B}) if return_outputs else loss

    def _check_finite(self, losses_B: Tensor, inputs: dict[str, Any]) -> None:
        finite = torch.isfinite(losses_B)
        if bool(finite.all()):
            return
        bad = [name for name, ok in zip(inputs["names"], finite.tolist(), strict=True) if not ok]
        raise self._diverged(
            f"the loss is not finite at step {self.state.global_step + 1} (queries: {some(bad, 3)})"
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
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise self._diverged(
                    f"weights are not finite after step {self.state.global_step} ({name})"
                )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()  # the checkpoint before is removed only for a sound one
        folder = Path(str(self.args.output_dir))
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise write_error(folder, error) from error
        except (SafetensorError, RuntimeError) as error:
            # safetensors and torch's own writer have no error type for a full disk.
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = first_line(error)
            raise OutputError(
                f"{folder}: cannot write a checkpoint ({reason}); free some space, then run the "
                "same command again: it resumes from the last one"
            ) from error

    def measure(self) -> Evaluation | HeldOutLoss:
        """Ask the held-out queries or rows; every process calls this and gets the result."""
        held_out, accelerator = self._held_out, self.accelerator
        if held_out is None:
            raise RuntimeError("no held-out queries")
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model: Any = self.model
        strength = self._extrapolated() if held_out.as_saved else contextlib.nullcontext()
        with accelerator.autocast(), strength:
            return held_out.measure(
                model if sharded else accelerator.unwrap_model(model),
                self.state.global_step,
                # The parts of a sharded model work together: every process asks everything.
                process=0 if sharded else accelerator.process_index,
                processes=1 if sharded else accelerator.num_processes,
            )

    def _extrapolated(self) -> contextlib.AbstractContextManager[None]:
        """Make the adapter as strong as it is going to be saved."""
        if self._config.lora_rank is None:
            return contextlib.nullcontext()
        from peft.helpers import rescale_adapter_scale

        return rescale_adapter_scale(self.student, self._config.lora_extrapolation)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure and log what is held out; the Trainer calls this when it is due."""
        metrics = self.log_evaluation(self.measure())
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log_evaluation(self, found: Evaluation | HeldOutLoss) -> dict[str, float]:
        """Log it as `eval_...` into the history that checkpoints hold."""
        metrics = metrics_of(found)
        self.log(dict(metrics))
        if self.is_world_process_zero():
            logger.info("step %d: held-out %s", found.step, found)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:  # noqa: ARG002
        """Have a checkpoint saved, and kept, where this step is the best so far."""
        if self._held_out is None or self._config.checkpoint_selection != "best":
            return False
        best = self._held_out.rule.choose(evaluations_of(self.state.log_history)).step
        if best == self.state.global_step:
            self.state.best_global_step = best
            self.control.should_save = True
        return best == self.state.global_step

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of what a checkpoint lacks, but not of a tied weight's second name."""
        tied = set(getattr(self.student, "_tied_weights_keys", None) or ())
        if missing := set(load_result.missing_keys) - tied:
            logger.warning(
                "the checkpoint lacks %d weights, such as %s", len(missing), min(missing)
            )

    def load_best(self) -> int:
        """Load the weights of the best step and return its number; every process calls this."""
        best = self.state.best_global_step
        if best is not None and best != self.state.global_step:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{best}"
            self.state.best_model_checkpoint = str(folder)
            self._load_best_model()
        return self.state.global_step if best is None else int(best)

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
