"""What a run shows and how it stops: progress bar, log file, signals."""

# The Trainer fixes the signature of every event, used or not.
# ruff: noqa: ARG002

import itertools
import json
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce  # type: ignore[import-untyped]
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from duet_unlearn.distill.training.checkpoint_selection import (
    Evaluation,
    HeldOutLoss,
    LowestLoss,
    Rule,
    evaluations_of,
)
from duet_unlearn.progress import Progress

if TYPE_CHECKING:
    from duet_unlearn.distill.training.trainer import DuetTrainer

# The first steps allocate and plan: on the demo world they take half as long again.
WARM_UP_STEPS = 2


class ShowProgress(TrainerCallback):
    """A bar over optimizer steps, or a log line every so often, with the loss of each split."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Begin where training starts or resumes."""
        if state.is_world_process_zero:
            self._progress = Progress(
                "distilling", state.max_steps, "steps", done=state.global_step
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Advance by one step."""
        if self._progress is not None:
            self._progress.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the loss of each split beside the count."""
        losses = {name: v for name, v in (logs or {}).items() if name.startswith("loss_")}
        if self._progress is not None and losses:
            self._progress.note(**losses)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """End it."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class StepClock(TrainerCallback):
    """Wall time from the end of one optimizer step to the end of the next, in seconds."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    @property
    def median(self) -> float:
        """Of a step; those that warm up count only where there are no others."""
        steps = [after - before for before, after in itertools.pairwise(self._ends)]
        return statistics.median(steps[WARM_UP_STEPS:] or steps or [0.0])

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._ends = [time.perf_counter()]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Note when the step ended."""
        self._ends.append(time.perf_counter())


class LogFile(TrainerCallback):
    """Every log line as one JSON object a line; a resumed run resumes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Drop lines of steps that were lost with a killed run and will be done again."""
        if state.is_world_process_zero:
            lines = [json.dumps(entry) for entry in state.log_history]
            self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Append what was logged."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class Schedule(TrainerCallback):
    """Evaluates every so many steps and after the last one; a log line goes before each."""

    def __init__(
        self, trainer: "DuetTrainer", eval_steps: int, rule: Rule | LowestLoss | None
    ) -> None:
        self._trainer = trainer
        self._eval_steps = eval_steps
        self._rule = rule
        self.base: Evaluation | HeldOutLoss | None = None
        """Measured before training began, in time for the log."""
        self.begun = False

    def stopped_early(self, state: TrainerState) -> bool:
        """Return whether the patience is used up."""
        return self._rule is not None and self._rule.may_stop(evaluations_of(state.log_history))

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Raise where a resumed run had done its last step.

        The Trainer asks after a step whether it was the last one, so it cannot be told to do none.
        """
        if state.global_step and (
            state.global_step >= state.max_steps or self.stopped_early(state)
        ):
            raise AlreadyTrained
        if self.base is not None:
            self._trainer.log_evaluation(self.base)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Note that a checkpoint, where there was one, could be read."""
        self.begun = True

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> Any:
        """Ask for what is due."""
        last = state.global_step >= state.max_steps
        if self._eval_steps and (last or state.global_step % self._eval_steps == 0):
            control.should_evaluate = control.should_log = True
        if last:
            control.should_log = True  # so that a run ends on its final loss
        return control

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **_: Any) -> Any:
        """Stop if the patience is used up."""
        if self.stopped_early(state):
            control.should_training_stop = True
        return control


class AlreadyTrained(Exception):  # noqa: N818 - it ends nothing but a loop that has no work
    """A resumed run had done its last step; its state is loaded."""


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM, finish the step, save a checkpoint and stop; a second one stops now."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Take the two signals over while training runs."""
        try:
            previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns it handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask the Trainer to save and stop, every process at the same step."""
        stop = self.received is not None
        if args.world_size > 1:
            flag = torch.tensor(float(stop), device=args.device)
            stop = bool(reduce(flag, reduction="sum") > 0)
            self.received = (self.received or signal.SIGTERM) if stop else None
        if stop:
            control.should_save = control.should_training_stop = True
        return control
