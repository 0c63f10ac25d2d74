"""The prefix at work: the strongest first tokens of base, teacher and student, side by side."""

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.messages import messages_from_text
from duet_unlearn.data.models.adapters import resolve_with_adapter
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.evaluation.report.content import cached_sample
from duet_unlearn.evaluation.report.sources import Sources

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

STRONGEST = 10


def compare_first_tokens(sources: Sources, count: int) -> list[dict[str, Any]]:
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
    _, document = sources.evaluations[0]
    asked: list[dict[str, Any]] = [
        {"query": text, "split": split, "columns": []}
        for split in ("forget", "retain")
        for text in _evaluated(document, split, count)
    ]
    asked += [cached_sample(s) for summary in sources.caches for s in summary["samples"]]
    choices: list[int] = []
    columns: list[list[dict[str, Any]]] = [[] for _ in asked]
    for label, tokenizer, logits in _first_logits(document, [a["query"] for a in asked]):
        choices = choices or [int(row.argmax()) for row in logits]
        for column, row, choice in zip(columns, logits, choices, strict=True):
            column.append(_column(label, tokenizer, row, choice))
    return [
        {**question, "columns": column + question["columns"]}
        for question, column in zip(asked, columns, strict=True)
    ]


def _evaluated(document: dict[str, Any], split: str, count: int) -> list[str]:
    """Evenly spread over the split, for files are often sorted by kind."""
    names = {s["name"] for s in document["sets"] if s["split"] == split}
    texts = [q["query"] for q in document["queries"] if q["set"] in names and q["attack"] is None]
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def _first_logits(
    document: dict[str, Any], queries: list[str]
) -> Iterator[tuple[str, "PreTrainedTokenizerBase", list["Tensor"]]]:
    """Yield each row's label and tokenizer with its logits `[V]` behind each query's prompt."""
    import torch

    config, rows = document["config"], document["models"]
    for name in dict.fromkeys(row["model"] for row in rows):
        folder, adapter = resolve_with_adapter(name)
        tokenizer = load_tokenizer(folder)
        model: Any = load_model(folder, dtype=config["dtype"], adapter=adapter)
        for row in rows:
            if row["model"] != name:
                continue
            prefix = document["prefix"] if row["prefix"] else None
            renderer = PromptRenderer(tokenizer, prefix=prefix, place=config["prefix_place"])
            render = renderer.teacher_ids if row["prefix"] else renderer.student_ids
            with torch.no_grad():
                logits = [
                    model(
                        torch.tensor([render(messages_from_text(query))], device=model.device),
                        logits_to_keep=1,
                    )
                    .logits[0, -1]
                    .float()
                    .cpu()
                    for query in queries
                ]
            yield row["label"], tokenizer, logits
        del model
        gc.collect()


def _column(
    label: str, tokenizer: "PreTrainedTokenizerBase", logits: "Tensor", choice: int
) -> dict[str, Any]:
    def describe(token: int) -> dict[str, Any]:
        return {
            "id": token,
            "text": _token_text(tokenizer, token),
            "logit": round(float(logits[token]), 4),
            "probability": round(float((logits[token] - total).exp()), 6),
        }

    total = logits.logsumexp(dim=-1)
    found: dict[str, Any] = {
        "label": label,
        "tokens": [describe(int(i)) for i in logits.topk(STRONGEST).indices],
    }
    if choice < logits.shape[0]:
        rank = 1 + int((logits > logits[choice]).sum())
        found["base_choice"] = {**describe(choice), "rank": rank}
    return found


def _token_text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """The token as text; its raw form where it is no whole character or decodes to nothing."""
    text = str(tokenizer.decode([token]))
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>")
