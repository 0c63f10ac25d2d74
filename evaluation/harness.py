"""Other people's benchmarks on the evaluated models: lm-eval's tasks, by its Python API.

lm-eval (EleutherAI's harness) is an extra. It gets each model as this project loads it, adapter
merged and weights rounded, and asks by its own defaults: without chat template, with a task's own
shots.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.loading import is_out_of_memory
from duet_unlearn.errors import ConfigurationError, first_line
from duet_unlearn.evaluation.config import EvalConfig
from duet_unlearn.evaluation.subjects import Subject

Scores = dict[str, dict[str, float]]
"""By task or group, then by metric as lm-eval spells it (`acc,none`), as lm-eval gives them."""


class Harness:
    """Some tasks of lm-eval, found and loaded once to see that they can be.

    Args:
        config: Its `lm_eval` are names of tasks, groups or tags, or YAML files; the files in its
            `lm_eval_path` win over lm-eval's own. Of each task the first `limit` documents are
            taken, None takes all; `batch_size` is that of the forward passes.

    Raises:
        ConfigurationError: lm-eval is not installed, or a task cannot be loaded.
    """

    def __init__(self, config: EvalConfig) -> None:
        folder = config.lm_eval_path
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigurationError(
                f"--lm-eval needs lm-eval, which cannot be imported ({error}); "
                'pip install "duet-unlearn[lm-eval]"'
            ) from error
        if folder is not None and not Path(folder).is_dir():
            raise ConfigurationError(f"--lm-eval-path {folder}: no such folder of task files")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._config = config
        self._tasks = list(dict.fromkeys(config.lm_eval))
        # lm-eval's own thousands of tasks take ten seconds to list: only where they are asked for.
        self._manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if not set(self._tasks) <= set(self._manager.all_tasks) and folder is not None:
            self._manager = TaskManager(include_path=folder)
        for task in self._tasks:
            try:
                with _quietly():
                    self._manager.load([task])
            except Exception as error:  # a task file may run anything and fetch its documents
                raise ConfigurationError(
                    f"--lm-eval {task}: lm-eval cannot load it ({first_line(error)}); give one of "
                    "its tasks, or the folder of its file as --lm-eval-path"
                ) from error

    def measure(self, subject: Subject) -> Scores:
        """Run the tasks on a model, without prefix.

        Raises:
            ConfigurationError: The memory does not hold a batch, or a task fails.
        """
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=subject.load(),
            tokenizer=subject.tokenizer,
            batch_size=self._config.batch_size,
        )
        try:
            with _quietly():
                found = simple_evaluate(
                    model=model,
                    tasks=self._tasks,
                    task_manager=self._manager,
                    limit=self._config.limit,
                    log_samples=False,
                )
        except Exception as error:
            advice = "lower --batch-size" if is_out_of_memory(error) else "leave the task out"
            raise ConfigurationError(
                f"--lm-eval on {subject.label}: {first_line(error)}; {advice}"
            ) from error
        groups: Mapping[str, Any] = found.get("groups", {})
        counts = {name: n["effective"] for name, n in found["n-samples"].items()}
        return {
            task: {
                **({"samples": counts[task]} if task in counts else {}),
                **{
                    name: float(v)
                    for name, v in scores.items()
                    if "," in name and isinstance(v, int | float)
                },
            }
            for task, scores in (found["results"] | groups).items()
        }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep lm-eval's bars out of what is no terminal; it has no switch for them."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
