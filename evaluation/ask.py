"""`duet-distill ask`: one question to several models side by side, plainly and under attacks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duet_unlearn.data.messages import check_text
from duet_unlearn.data.queries import Query
from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.evaluation.answers import stream_answers
from duet_unlearn.evaluation.config import AskConfig
from duet_unlearn.evaluation.subjects import open_subjects
from duet_unlearn.evaluation.tasks import Attack, Task, load_attacks, without_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one row says to one question."""

    label: str
    attack: str | None
    text: str


class Asker:
    """Models in memory, ready to be asked.

    Args:
        config: who is asked, and how.

    Raises:
        ConfigurationError: the prefix or an attack cannot be used.
        DataError: a model cannot be loaded.
    """

    def __init__(self, config: AskConfig) -> None:
        self._max_new_tokens = config.max_new_tokens
        attacks = load_attacks(config.attacks)
        for attack in attacks:
            if attack.shape is None:
                raise ConfigurationError(
                    f"attack {attack.name}: its wordings belong to the queries of a file; use it "
                    "in `duet-distill eval`"
                )
        if attacks and all(attack.needs_answers for attack in attacks):
            raise ConfigurationError(
                f"attack {attacks[0].name}: it shows reference answers, which a question has not; "
                "use it in `duet-distill eval`"
            )
        self._attacks: tuple[Attack | None, ...] = (None, *without_answers(attacks))
        opened = open_subjects(config, config.resolved_prefix)
        self._subjects = [(subject, subject.load()) for subject in opened]
        self.streams = len(config.labels) == len(self._attacks) == 1
        """Whether a question has one answer, which can be shown while it is made."""

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Iterator[Reply]:
        """Yield the reply of each row, plainly and under each attack.

        Args:
            question: one user turn.
            on_text: is given the pieces of an answer as they come, where `streams` holds.

        Raises:
            DataError: the question is too long for a model, or holds bytes that are no UTF-8.
        """
        try:
            check_text(question, "question")
        except ValueError as error:
            raise DataError(str(error)) from None
        query = Query.from_text(question, split="general")
        show = on_text if self.streams else None
        for attack in self._attacks:
            task = Task(set_name="ask", query=query, attack=attack)
            for subject, model in self._subjects:
                for label in subject.rows:
                    ((_, ids),) = stream_answers(
                        model,
                        subject.render(label, [task], self._max_new_tokens),
                        eos_token_ids=subject.ends,
                        max_new_tokens=self._max_new_tokens,
                        batch_size=1,
                        streamer=None if show is None else _streamer(subject.tokenizer, show),
                    )
                    yield Reply(label=label, attack=task.attack_name, text=subject.decode(ids))


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def split_question(words: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the models and the question of a command line, which may lack one.

    The last word is the question where it ends with a question mark, or has a blank in it and is no
    `NAME=MODEL`; other names of models have neither.
    """
    *models, last = words
    is_question = last.endswith("?") or (" " in last.strip() and "=" not in last)
    return (tuple(models), last) if models and is_question else (tuple(words), None)
