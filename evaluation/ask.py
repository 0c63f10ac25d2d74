"""`duet-distill ask`: one question to several models side by side, plainly and under attacks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.models.adapters import resolve_with_adapter
from duet_unlearn.data.models.folder import context_length, eos_token_ids, read_config
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.answers import stream_answers
from duet_unlearn.evaluation.config import AskConfig, ModelSpec
from duet_unlearn.evaluation.tasks import Attack, Task, check_length, load_attacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one row says to one question."""

    label: str
    attack: str | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    label: str
    prefixed: bool
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    renderer: PromptRenderer
    ends: tuple[int, ...]
    context: int | None


class Asker:
    """Models in memory, ready to be asked.

    Args:
        config: who is asked, and how.

    Raises:
        ConfigurationError: the prefix or an attack cannot be used.
        DataError: a model cannot be loaded.
    """

    def __init__(self, config: AskConfig) -> None:
        self._config = config
        self._prefix = (
            None if config.prefix is None else resolve_prefix(config.prefix, config.topic)
        )
        self._attacks: tuple[Attack | None, ...] = (None, *load_attacks(config.attacks))
        for attack in self._attacks:
            if attack and (attack.shape is None or attack.shape.needs_answers):
                raise ConfigurationError(
                    f"attack {attack.name}: it needs reference answers or wordings, which a "
                    "question has not; use it in `duet-distill eval`"
                )
        self._rows = [row for spec in config.models for row in self._open(spec)]

    @property
    def streams(self) -> bool:
        """Whether there is one answer to a question, which can be shown while it is made."""
        return len(self._rows) == 1 and len(self._attacks) == 1

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Iterator[Reply]:
        """Yield the reply of each row, plainly and under each attack.

        Args:
            question: one user turn.
            on_text: is given the pieces of an answer as they come, where `streams` holds.

        Raises:
            DataError: the question is too long for a model.
        """
        query = Query.from_text(question, split="general")
        for attack in self._attacks:
            task = Task(set_name="ask", query=query, attack=attack)
            for row in self._rows:
                yield Reply(
                    label=row.label,
                    attack=None if attack is None else attack.name,
                    text=self._answer(row, task, on_text if self.streams else None),
                )

    def _open(self, spec: ModelSpec) -> Iterator[_Row]:
        folder, adapter = resolve_with_adapter(spec.model)
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, dtype=self._config.dtype, adapter=adapter)
        prefixed = (False, True) if self._prefix and spec is self._config.models[0] else (False,)
        for with_prefix in prefixed:
            yield _Row(
                label=f"{spec.label} + prefix" if with_prefix else spec.label,
                prefixed=with_prefix,
                model=model,
                tokenizer=tokenizer,
                renderer=PromptRenderer(
                    tokenizer,
                    prefix=self._prefix if with_prefix else None,
                    place=self._config.prefix_place,
                ),
                ends=eos_token_ids(folder),
                context=context_length(read_config(folder)),
            )

    def _answer(self, row: _Row, task: Task, on_text: Callable[[str], None] | None) -> str:
        prompt = task.render(row.renderer, prefixed=row.prefixed)
        new_tokens = self._config.max_new_tokens
        check_length(task, len(prompt), row.label, row.context, new_tokens)
        ((_, ids),) = stream_answers(
            row.model,
            [prompt],
            eos_token_ids=row.ends,
            max_new_tokens=new_tokens,
            batch_size=1,
            streamer=None if on_text is None else _streamer(row.tokenizer, on_text),
        )
        return str(row.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def split_question(words: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the models and the question of a command line, which may lack one.

    The last word is the question where it has a blank in it or ends with a question mark; model
    names have neither, and `NAME=MODEL` is always a model.
    """
    *models, last = words
    is_question = "=" not in last and (" " in last.strip() or last.endswith("?"))
    return (tuple(models), last) if models and is_question else (tuple(words), None)
