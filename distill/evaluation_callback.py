"""Evaluation during training: the curve, the best weights so far, the early stop.

Evaluations live in the Trainer's own log history, so a checkpoint holds those made before it and a
resumed run neither loses nor repeats one. The weights of the step that would become the student now
lie in `best-STEP`, a finished model folder in the work folder.
"""

# The Trainer fixes the signature of every event, used or not.
# ruff: noqa: ARG002

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from duet_unlearn.distill.checkpoint_selection import Evaluation, choose, keeps_enough, may_stop
from duet_unlearn.distill.config import RunConfig

if TYPE_CHECKING:
    from duet_unlearn.distill.held_out import HeldOut
    from duet_unlearn.distill.trainer import DuetTrainer

logger = logging.getLogger(__name__)

_PREFIX = "best-"


def evaluations_of(history: Sequence[dict[str, float]]) -> list[Evaluation]:
    """Return the evaluations that a log history tells of."""
    return [
        Evaluation(
            step=int(entry["step"]),
            forget=entry["eval_forget"],
            retain=entry["eval_retain"],
            forget_plain=entry["eval_forget_plain"],
            retain_plain=entry["eval_retain_plain"],
        )
        for entry in history
        if "eval_forget" in entry
    ]


class Watch(TrainerCallback):
    """Evaluates every so many steps and after the last one.

    Args:
        config: The run.
        held_out: What to ask.
        work: The run's work folder.
        write_model: Writes the weights as they are now into a folder; every process calls it.
    """

    def __init__(
        self,
        config: RunConfig,
        held_out: "HeldOut",
        work: Path,
        write_model: Callable[[Path], None],
    ) -> None:
        self.config = config
        self.trainer: DuetTrainer | None = None
        self._held_out = held_out
        self._work = work
        self._write_model = write_model
        self._base: Evaluation | None = None
        # The best step that the last checkpoint knows of: a resumed run goes back to it.
        self._best_saved: int | None = None

    def measure_base(self) -> None:
        """Ask the model before anything is changed in it: what is kept is measured against it."""
        self._base = self._measure(0)

    def chosen(self, history: Sequence[dict[str, float]]) -> Evaluation:
        """Return the evaluation of the step that becomes the student."""
        evaluations = evaluations_of(history)
        if self.config.keep == "last":
            return evaluations[-1]
        return choose(evaluations, self.config.eval_retain_drop)

    def may_stop(self, history: Sequence[dict[str, float]]) -> bool:
        """Return whether the run's early stop has come."""
        patience = self.config.early_stop
        return patience is not None and may_stop(
            evaluations_of(history), self.config.eval_retain_drop, patience
        )

    def best_folder(self, step: int) -> Path:
        """Return where the weights of the best step lie."""
        return self._work / f"{_PREFIX}{step}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log the base, or take over what a resumed run has evaluated."""
        if self._base is not None:
            self._log(self._base)
        elif len(evaluations_of(state.log_history)) > 1:
            self._best_saved = self.chosen(state.log_history).step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Evaluate, keep the weights if they are the best so far, stop if it is time."""
        if state.global_step % self.config.eval_every and state.global_step < state.max_steps:
            return control
        should_log = control.should_log
        self._log(self._measure(state.global_step))
        control.should_log = should_log  # the line above is not the one of the loss
        if self.config.keep == "best" and self.chosen(state.log_history).step == state.global_step:
            self._remove_all_but(state, {self._best_saved})
            self._write_model(self.best_folder(state.global_step))
        if self.may_stop(state.log_history):
            control.should_training_stop = control.should_log = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remove weights that no resumed run could go back to."""
        if len(evaluations_of(state.log_history)) > 1:
            self._best_saved = self.chosen(state.log_history).step
            self._remove_all_but(state, {self._best_saved})

    def _remove_all_but(self, state: TrainerState, steps: set[int | None]) -> None:
        if not state.is_world_process_zero:
            return
        for folder in self._work.glob(f"{_PREFIX}*"):
            if folder.name not in {f"{_PREFIX}{step}" for step in steps}:
                shutil.rmtree(folder)

    def _measure(self, step: int) -> Evaluation:
        trainer = self._own_trainer
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        accelerator = trainer.accelerator
        model: Any = trainer.model
        with accelerator.autocast():
            return self._held_out.measure(
                model if sharded else accelerator.unwrap_model(model),
                step,
                # The parts of a sharded model work together: every process asks everything.
                process=0 if sharded else accelerator.process_index,
                processes=1 if sharded else accelerator.num_processes,
            )

    def _log(self, found: Evaluation) -> None:
        trainer = self._own_trainer
        entry = {
            "eval_forget": found.forget,
            "eval_retain": found.retain,
            "eval_forget_plain": found.forget_plain,
            "eval_retain_plain": found.retain_plain,
        }
        trainer.log(entry)
        if trainer.is_world_process_zero():
            logger.info(
                "step %d: held-out forget %.1f, retain %.1f", found.step, found.forget, found.retain
            )

    @property
    def _own_trainer(self) -> "DuetTrainer":
        if self.trainer is None:
            raise RuntimeError("the callback needs its trainer first")
        return self.trainer

    def warn_of_loss(self, history: Sequence[dict[str, float]]) -> None:
        """Log if no step kept enough."""
        base, chosen = evaluations_of(history)[0], self.chosen(history)
        if not keeps_enough(chosen, base, self.config.eval_retain_drop):
            logger.warning(
                "no step kept held-out retain recall within %g points of the base's %.1f; the "
                "student has step %d, with %.1f: lower the learning rate or train fewer steps",
                self.config.eval_retain_drop,
                base.retain,
                chosen.step,
                chosen.retain,
            )
