"""Greedy answers of a causal language model to prompts of token ids.

An answer is a function of the model and the prompt alone: not of the batch it was computed in
(in float32; rounding in bfloat16 can tip a near tie), and not of the sampling defaults that a
model folder brings along.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.models.adapters import add_adapter
from duet_unlearn.data.models.folder import read_config, stored_dtype
from duet_unlearn.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 32_768
"""Bound on rows x (longest prompt + new tokens) of a batch, which bounds the KV cache."""


def load_model(
    folder: Path, *, dtype: str = "auto", adapter: Path | None = None
) -> "PreTrainedModel":
    """Load a model for answering, on the GPU where there is one.

    Args:
        folder: a transformers model folder.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: float32 on a CPU, else as stored.
        adapter: a peft adapter folder to put into the model.

    Raises:
        ConfigurationError: the GPU's memory does not hold the model, or peft is not installed.
        DataError: transformers cannot load the folder, weights of the model are missing in it, or
            the adapter does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    if dtype == "auto":
        dtype = stored_dtype(read_config(folder)) if on_gpu else "float32"
    try:
        with _no_loading_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map="auto" if on_gpu else None,
                local_files_only=True,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"model {folder}: does not fit into the memory of the GPU as {dtype}; "
            "free some of it or use --dtype bfloat16"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"model {folder}: transformers cannot load it ({reason}); "
            "expected a causal language model it knows"
        ) from error
    model, info = loaded
    # transformers fills what is missing with random numbers, and the answers would be noise.
    if info["missing_keys"]:
        raise DataError(
            f"model {folder}: {len(info['missing_keys'])} weights are missing in its files, the "
            f"first is {min(info['missing_keys'])}; copy or save the model again"
        )
    if adapter is not None:
        model = add_adapter(model, adapter)
    model.eval()
    return model  # type: ignore[no-any-return]


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_tokens: int = MAX_BATCH_TOKENS,
) -> list[list[int]]:
    """Group prompts of like length, the longest first.

    Longest first means that a batch too large for the memory fails at once and not at the end.

    Args:
        lengths: prompt lengths in tokens.
        batch_size: most rows of a batch.
        max_new_tokens: most tokens of an answer.
        max_tokens: most rows x (longest prompt + new tokens); one row may exceed it.

    Returns:
        Batches of indices into `lengths`, each index once.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= room:
            batches.append([])
            room = max(1, min(batch_size, max_tokens // (lengths[index] + max_new_tokens)))
        batches[-1].append(index)
    return batches


def generate_answers(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[Sequence[int]], None] | None = None,
) -> list[list[int]]:
    """Answer each prompt greedily.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: token ids, each of at least one token.
        eos_token_ids: the ids that end an answer; may be empty.
        max_new_tokens: most tokens of an answer.
        batch_size: most prompts of a forward pass.
        on_batch: is told the indices of the prompts that have just been answered.

    Returns:
        The new token ids of each prompt, up to and without its end of sequence.

    Raises:
        ConfigurationError: the device's memory does not hold a batch.
    """
    import torch

    settings = _generation_config(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
        use_cache=True,
    )
    # `generate` fills whatever is unset from the folder's own defaults (a repetition penalty,
    # say), so that those have to go too.
    model.generation_config = _generation_config()
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) for prompt in prompts]
    for batch in plan_batches(lengths, batch_size=batch_size, max_new_tokens=max_new_tokens):
        try:
            new_ids = _generate_batch(model, [prompts[i] for i in batch], settings)
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"{len(batch)} prompts of up to {lengths[batch[0]]} tokens do not fit into the "
                "memory of the GPU; use a smaller --batch-size"
            ) from error
        for index, row in zip(batch, new_ids, strict=True):
            answers[index] = cut_at_end(row, eos_token_ids)
        if on_batch is not None:
            on_batch(batch)
    return answers


def cut_at_end(token_ids: Sequence[int], eos_token_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end of sequence."""
    ends = frozenset(eos_token_ids)
    for position, token_id in enumerate(token_ids):
        if token_id in ends:
            return list(token_ids[:position])
    return list(token_ids)


@contextlib.contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Keep transformers' own bar off: it would break the caller's, and fill log files."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _generation_config(**settings: object) -> Any:
    from transformers import GenerationConfig

    untyped: Any = GenerationConfig
    return untyped(**settings)


def _generate_batch(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], settings: Any
) -> list[list[int]]:
    """Generate for prompts that are padded on the left, where the mask hides the padding."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    fill = settings.pad_token_id
    rows = [[fill] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    generate: Any = model.generate
    # Not inference mode: a model that is trained on could not use what it makes there.
    with torch.no_grad():
        output = generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
        )
    return output[:, longest:].tolist()  # type: ignore[no-any-return]
