"""What a model still tells of held-out queries, asked in the middle of its training.

Answers are those of `duet-distill eval` with the same queries, attacks and length: greedy, scored
by ROUGE-L recall. Nothing of the training is left changed: not the model's mode or generation
settings, not a random number.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import Student
from duet_unlearn.distill.training.checkpoint_selection import Evaluation, Rule
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.measures import Answer
from duet_unlearn.evaluation.results import EvalReport
from duet_unlearn.evaluation.subjects import Subject
from duet_unlearn.evaluation.tasks import Task, list_tasks, load_attacks, load_sets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duet_unlearn.data.prompts import PromptRenderer

_LABEL = "student"


class HeldOut:
    """The held-out queries of a run.

    Raises:
        ConfigurationError: An attack is unknown.
        DataError: A query file is missing or malformed, or a query has no answer.
    """

    as_saved = True
    """Whether an adapter is measured as strong as it will be saved, not as it is trained."""

    def __init__(self, config: RunConfig) -> None:
        self._config = EvalConfig(
            models=(ModelSpec(label=_LABEL, model=config.student),),
            forget=config.eval_forget,
            retain=config.eval_retain,
            attacks=config.eval_attacks,
            limit=config.eval_limit,
            max_new_tokens=config.eval_max_new_tokens,
        )
        self._attacks = load_attacks(config.eval_attacks)
        self._sets = load_sets(self._config.sources, limit=config.eval_limit)
        self._tasks = list_tasks(self._sets, self._attacks)
        self.rule = Rule(drop=config.eval_retain_drop, patience=config.early_stopping_patience)

    @property
    def fingerprint(self) -> str:
        """Of everything that is asked and expected."""
        asked = [[t.query.split, t.query.text, *t.query.references, _asked(t)] for t in self._tasks]
        return "sha256:" + hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def prepare(
        self, student: Student, renderer: "PromptRenderer", tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        """Render all prompts.

        Raises:
            DataError: A query is empty or too long for the student, or its template refuses it.
        """
        # Renders, limits and decodes as an evaluation does; what answers is the model in training.
        self._subject = Subject(
            folder=student.folder,
            adapter=None,
            dtype=student.stored_dtype,
            tokenizer=tokenizer,
            renderer=renderer,
            rows={_LABEL: False},
        )
        self._ends = self._subject.ends  # once: the base's folder may go while training runs
        self._prompts = self._subject.render(_LABEL, self._tasks, self._config.max_new_tokens)

    @property
    def texts(self) -> set[str]:
        """The queries as they are asked plainly."""
        return {query.text for s in self._sets for query in s.queries}

    def measure(
        self, model: "PreTrainedModel", step: int, *, process: int = 0, processes: int = 1
    ) -> Evaluation:
        """Ask everything; several processes share the work and all get the result.

        Args:
            model: The student as it is now.
            step: Optimizer steps done.
            process: Index of this process.
            processes: How many processes share the queries; 1 where each has to ask them all.
        """
        with undisturbed(model):
            answers = generate_answers(
                model,
                self._prompts[process::processes],
                eos_token_ids=self._ends,
                max_new_tokens=self._config.max_new_tokens,
                batch_size=self._config.batch_size,
            )
        shares: list[list[list[int]]] = [answers]
        if processes > 1:
            from accelerate.utils import gather_object  # type: ignore[import-untyped]

            shares = gather_object(shares)
        everything: list[list[int]] = [[] for _ in self._prompts]
        for number, share in enumerate(shares):
            everything[number::processes] = share
        return self._evaluate(everything, step)

    def _evaluate(self, answers: Sequence[Sequence[int]], step: int) -> Evaluation:
        report = EvalReport(
            config=self._config,
            prefix=None,
            attacks=self._attacks,
            sets=self._sets,
            tasks=self._tasks,
            answers={_LABEL: [Answer(text=self._subject.decode(ids)) for ids in answers]},
        )
        forget = report.mean(_LABEL, split="forget")
        retain = report.mean(_LABEL, split="retain")
        worst_forget, worst_retain = (report.worst(_LABEL, s) for s in ("forget", "retain"))
        return Evaluation(
            step=step,
            forget=forget if worst_forget is None else max(forget, worst_forget),
            retain=retain if worst_retain is None else min(retain, worst_retain),
            forget_plain=forget,
            retain_plain=retain,
        )


@contextlib.contextmanager
def undisturbed(model: "PreTrainedModel") -> Iterator[None]:
    """Run the model in evaluation mode, and put everything back."""
    import torch

    base: Any = getattr(model, "get_base_model", lambda: model)()
    training = model.training
    kept = [(owner, owner.generation_config) for owner in (model, base)]
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(training)
        for owner, settings in kept:
            owner.generation_config = settings


def _asked(task: Task) -> Any:
    """The text of the attack's shape, or the conversation that the attack has for the query."""
    if task.attack is None:
        return None
    wordings = task.attack.wordings
    return task.attack.text if wordings is None else wordings[task.query.text]
