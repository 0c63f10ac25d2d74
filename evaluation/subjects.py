"""Who is asked: each model with the rows that it answers, plainly and behind the prefix."""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duet_unlearn.data.models.adapters import resolve_with_adapter
from duet_unlearn.data.models.folder import context_length, eos_token_ids, read_config
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.models.quantization import quantize_weights
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.evaluation.config import SubjectsConfig
from duet_unlearn.evaluation.tasks import Task, check_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that is not in memory yet, and its rows."""

    folder: Path
    adapter: Path | None
    """A LoRA adapter on top of the model in `folder`."""
    dtype: str
    quantized: str | None = None
    """The scheme by which its weights are rounded; None leaves them."""
    tokenizer: "PreTrainedTokenizerBase"
    renderer: PromptRenderer
    rows: Mapping[str, bool]
    """By label, whether the row stands behind the prefix."""

    @property
    def label(self) -> str:
        """What the model without prefix is called."""
        return next(iter(self.rows))

    @property
    def ends(self) -> tuple[int, ...]:
        """The token ids that end an answer."""
        return eos_token_ids(self.folder)

    def load(self) -> "PreTrainedModel":
        """Load the model, its adapter merged, for answering.

        Errors are those of `load_model` and `quantize_weights`.
        """
        model = load_model(self.folder, dtype=self.dtype, adapter=self.adapter)
        if self.quantized is not None:
            quantize_weights(model, self.quantized)
        return model

    def render(self, label: str, tasks: Sequence[Task], max_new_tokens: int) -> list[Prompt]:
        """Return the prompts of one row.

        Raises:
            DataError: A task is empty or too long for the model, or its template refuses it.
        """
        context = context_length(read_config(self.folder))
        prompts = []
        for task in tasks:
            prompt = tuple(task.render(self.renderer, prefixed=self.rows[label]))
            check_length(task, len(prompt), label, context, max_new_tokens)
            prompts.append(prompt)
        return prompts

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return an answer as text."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


def open_subjects(config: SubjectsConfig, prefix: str | None) -> list[Subject]:
    """Find every model; the first one has a second row where there is a prefix.

    A model with rounded weights is a model of its own.

    Raises:
        DataError: A model is missing or malformed.
        MismatchError: An adapter belongs to another base.
    """
    subjects = []
    for spec in config.models:
        quantized = config.quantized_rows(spec)
        rows = {
            label: label == config.prefixed_label
            for label in config.rows_of(spec)
            if label not in quantized
        }
        plain = open_subject(
            spec.model,
            rows,
            dtype=config.dtype,
            prefix=prefix if len(rows) > 1 else None,
            place=config.prefix_place,
        )
        subjects += [
            plain,
            *(
                dataclasses.replace(plain, rows={label: False}, quantized=scheme)
                for label, scheme in quantized.items()
            ),
        ]
    return subjects


def open_subject(
    model: str,
    rows: Mapping[str, bool],
    *,
    dtype: str,
    prefix: str | None = None,
    place: str = "system",
) -> Subject:
    """Find one model; arguments are as in `Subject` and `PromptRenderer`.

    Raises:
        DataError: It is missing or malformed.
        MismatchError: An adapter belongs to another base.
    """
    folder, adapter = resolve_with_adapter(model)
    tokenizer = load_tokenizer(folder)
    return Subject(
        folder=folder,
        adapter=adapter,
        dtype=dtype,
        tokenizer=tokenizer,
        renderer=PromptRenderer(tokenizer, prefix=prefix, place=place),
        rows=rows,
    )


def free_memory() -> None:
    """Give the last model's memory back before the next one comes."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
