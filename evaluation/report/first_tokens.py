"""The prefix at work: the strongest first tokens of base, teacher and student, side by side."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.messages import messages_from_text
from duet_unlearn.data.models.tokenizer import token_text
from duet_unlearn.evaluation.config import AskConfig, ModelSpec
from duet_unlearn.evaluation.report.content import cached_sample
from duet_unlearn.evaluation.report.sources import Document, Sources, reading
from duet_unlearn.evaluation.subjects import free_memory, open_subjects
from duet_unlearn.evaluation.tasks import spread

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

STRONGEST = 10


def compare_first_tokens(sources: Sources, count: int) -> list[Document]:
    """Return the ten strongest first tokens of each row of the first evaluation.

    Asked are `count` of each split's evaluated queries, and the samples of the caches: trained
    queries, with what was cached of them beside. A column's `base_choice` is where the base's
    strongest token stands in it.

    Raises:
        DataError: A model of the evaluation is not where it says, or cannot be loaded.
        ConfigurationError: The memory does not hold a model.
    """
    if not sources.evaluations:
        return []
    name, document = sources.evaluations[0]
    with reading(name, "write it again with `duet-distill eval --out`"):
        config = _config(document)
        asked: list[Document] = [
            {"query": text, "split": split, "columns": []}
            for split in ("forget", "retain")
            for text in _evaluated(document, split, count)
        ]
    # What stands before a given response is not all of its text.
    cached = [s for summary in sources.caches for s in summary["samples"] if s["split"] != "train"]
    asked += map(cached_sample, cached)
    choices: list[int] = []
    columns: list[list[Document]] = [[] for _ in asked]
    for label, tokenizer, logits in _first_logits(config, [a["query"] for a in asked]):
        choices = choices or [int(row.argmax()) for row in logits]
        for column, row, choice in zip(columns, logits, choices, strict=True):
            column.append(_column(label, tokenizer, row, choice))
    return [
        {**question, "columns": column + question["columns"]}
        for question, column in zip(asked, columns, strict=True)
    ]


def _config(document: Document) -> AskConfig:
    """Return who was evaluated, with the prefix as it stood in the prompts."""
    known, prefixed = document["config"], {}
    if document["prefix"] is not None:
        prefixed = {"prefix": document["prefix"], "prefix_place": known["prefix_place"]}
    return AskConfig(
        models=tuple(ModelSpec(**spec) for spec in known["models"]),
        dtype=known["dtype"],
        **prefixed,
    )


def _evaluated(document: Document, split: str, count: int) -> list[str]:
    """Evenly spread over the split, for files are often sorted by kind."""
    names = {s["name"] for s in document["sets"] if s["split"] == split}
    texts = [q["query"] for q in document["queries"] if q["set"] in names and q["attack"] is None]
    return spread(texts, count)


def _first_logits(
    config: AskConfig, queries: list[str]
) -> Iterator[tuple[str, "PreTrainedTokenizerBase", list["Tensor"]]]:
    """Yield each row's label and tokenizer with its logits `[V]` behind each query's prompt."""
    import torch

    asked = [messages_from_text(query) for query in queries]
    # The text as it stood in the prompts, which resolving again could change.
    for subject in open_subjects(config, config.prefix):
        model: Any = subject.load()
        for label, prefixed in subject.rows.items():
            render = subject.renderer.teacher_ids if prefixed else subject.renderer.student_ids
            prompts = [torch.tensor([render(m)], device=model.device) for m in asked]
            with torch.no_grad():
                outputs = [model(prompt, logits_to_keep=1).logits[0, -1] for prompt in prompts]
            yield label, subject.tokenizer, [logits.float().cpu() for logits in outputs]
        del model
        free_memory()


def _column(
    label: str, tokenizer: "PreTrainedTokenizerBase", logits: "Tensor", choice: int
) -> Document:
    def describe(token: int) -> Document:
        return {
            "id": token,
            "text": token_text(tokenizer, token),
            "logit": round(float(logits[token]), 4),
            "probability": round(float((logits[token] - total).exp()), 6),
        }

    total = logits.logsumexp(dim=-1)
    found: Document = {
        "label": label,
        "tokens": [describe(int(i)) for i in logits.topk(STRONGEST).indices],
    }
    if choice < logits.shape[0]:
        rank = 1 + int((logits > logits[choice]).sum())
        found["base_choice"] = {**describe(choice), "rank": rank}
    return found
