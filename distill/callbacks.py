"""What a run shows and how it stops: progress bar, log file, signals."""

# The Trainer fixes the signature of every event, used or not.
# ruff: noqa: ARG002

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState


class Progress(TrainerCallback):
    """A bar over optimizer steps on standard error, quiet when that is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar where training starts or resumes."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="distilling",
                unit=" steps",
                disable=not sys.stderr.isatty(),
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance by one step."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss of each split beside the bar."""
        if self._bar is not None and logs and "loss" in logs:
            shown = {
                name.removeprefix("loss_"): f"{value:.4f}"
                for name, value in logs.items()
                if name.startswith("loss_")
            }
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, after a failure too."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LogFile(TrainerCallback):
    """Every log line as one JSON object a line; a resumed run goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop lines of steps that were lost with a killed run and will be done again."""
        if state.is_world_process_zero:
            lines = [json.dumps(entry) for entry in state.log_history]
            self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Append what was logged."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class LogLastStep(TrainerCallback):
    """The last step is logged whatever the interval, so that a run ends on its final loss."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for a log line at the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control


class AlreadyTrained(Exception):  # noqa: N818 - it ends nothing but a loop that has no work
    """A resumed run had done its last step; its state is loaded."""


class StopIfDone(TrainerCallback):
    """Keeps a resumed run that had done its last step from doing one more.

    The Trainer asks after a step whether it was the last one, so it cannot be told to do none.

    Args:
        may_stop: Tells from the log history whether the run was to end early.
    """

    def __init__(self, may_stop: Callable[[list[dict[str, float]]], bool] | None = None) -> None:
        self._may_stop = may_stop

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raise where there is nothing left to do."""
        early = self._may_stop is not None and self._may_stop(state.log_history)
        if state.global_step and (state.global_step >= state.max_steps or early):
            raise AlreadyTrained


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM, finish the step, save a checkpoint and stop; a second one stops now."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.trainer: Trainer | None = None

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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask the Trainer to save and stop, every process at the same step."""
        stop = self.received is not None
        if self.trainer is not None and self.trainer.accelerator.num_processes > 1:
            flag = torch.tensor(float(stop), device=args.device)
            stop = bool(self.trainer.accelerator.reduce(flag, reduction="sum") > 0)
            self.received = (self.received or signal.SIGTERM) if stop else None
        if stop:
            control.should_save = control.should_training_stop = True
        return control
