"""Greedy answers of a causal language model to token ids, and the likelihood of given answers.

An answer is a function of the model and the prompt alone: not of the batch it was computed in
(in float32; rounding in bfloat16 can tip a near tie), and not of the sampling defaults that a
model folder brings along.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from duet_unlearn.data.models.loading import is_out_of_memory
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.measures import Likelihood

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MAX_BATCH_TOKENS = 32_768
"""Bound on rows x (longest prompt + new tokens) of a batch, which bounds the KV cache."""
_MAX_LOGITS = 1 << 27
"""Bound on rows x positions x vocabulary of a scored batch: half a gigabyte of float32."""

_Item = TypeVar("_Item")
_Row = TypeVar("_Row")


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_tokens: int = MAX_BATCH_TOKENS,
) -> list[list[int]]:
    """Group prompts of like length, the longest first.

    Longest first means that a batch too large for the memory fails at once and not at the end.

    Returns:
        Batches of indices into `lengths`, each index once: at most `batch_size` rows, and at most
        `max_tokens` of rows x (longest prompt + new tokens), which one row alone may exceed.
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
) -> list[list[int]]:
    """Return the answers of `stream_answers`, one a prompt."""
    answers = dict(
        stream_answers(
            model,
            prompts,
            eos_token_ids=eos_token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    )
    return [answers[index] for index in range(len(prompts))]


def stream_answers(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    streamer: Any = None,
    sampled: bool = False,
) -> Iterator[tuple[int, list[int]]]:
    """Yield the index of each prompt with its greedy answer, without the end of sequence.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: token ids, each of at least one token.
        eos_token_ids: the ids that end an answer; may be empty.
        max_new_tokens: most tokens of an answer.
        batch_size: most prompts of a forward pass.
        streamer: is given the tokens of the one prompt as they come (transformers' `streamer`).
        sampled: draw each token from the model's own distribution instead, by torch's generator.

    Raises:
        ConfigurationError: the device's memory does not hold a prompt.
    """
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    settings = _generation_config(
        do_sample=sampled,
        **sampling,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
        use_cache=True,
    )
    # `generate` fills whatever is unset from the folder's own defaults (a repetition penalty,
    # say), so that those have to go too.
    model.generation_config = _generation_config()

    def answer(batch: Sequence[int]) -> list[list[int]]:
        return _generate_batch(model, [prompts[i] for i in batch], settings, streamer)

    lengths = [len(prompt) for prompt in prompts]
    for batch in plan_batches(lengths, batch_size=batch_size, max_new_tokens=max_new_tokens):
        new_ids = run_in_memory(answer, batch, lengths.__getitem__)
        for index, row in zip(batch, new_ids, strict=True):
            yield index, cut_at_end(row, eos_token_ids)


def cut_at_end(token_ids: Sequence[int], eos_token_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end of sequence."""
    ends = frozenset(eos_token_ids)
    return list(itertools.takewhile(lambda token_id: token_id not in ends, token_ids))


def score_references(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    on_scored: Callable[[int], object] = lambda _count: None,
) -> list[Likelihood]:
    """Return how a model takes each answer behind its prompt, teacher-forced.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: token ids, each of at least one token.
        answers: the token ids of one answer a prompt, each of at least one token.
        batch_size: most pairs of a forward pass.
        on_scored: is given the number of pairs after each pass.

    Raises:
        ConfigurationError: the memory does not hold a prompt and its answer.
    """

    def score(batch: Sequence[int]) -> list[Likelihood]:
        return _score_batch(model, [prompts[i] for i in batch], [answers[i] for i in batch])

    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    longest = max(map(len, answers), default=1)
    rows = rows_of_logits(model, batch_size, longest + 1)
    return run_batches(score, lengths, batch_size=rows, on_done=on_scored)


@contextlib.contextmanager
def contiguous_head_input(model: "PreTrainedModel") -> Iterator[None]:
    """Hand the head rows that lie side by side in memory while the block runs.

    A prefill hands it `hidden[:, -1:]`, a slice with gaps. `torch.matmul` folds such a slice
    `[B, 1, H]` with the head's weight `[V, H]` only if the weight needs a gradient; for a frozen
    one it copies the whole head for each of the B rows.
    """

    def compact(_head: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.contiguous() if hasattr(x, "contiguous") else x for x in inputs)

    anything: Any = model
    head = anything.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(compact)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _generation_config(**settings: object) -> Any:
    from transformers import GenerationConfig

    untyped: Any = GenerationConfig
    return untyped(**settings)


def _generate_batch(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], settings: Any, streamer: Any
) -> list[list[int]]:
    import torch

    ids, mask = pad(prompts, model.device, fill=settings.pad_token_id, left=True)
    generate: Any = model.generate
    # Not inference mode: a model that is trained on could not use what it makes there.
    with torch.no_grad(), contiguous_head_input(model):
        output = generate(ids, attention_mask=mask, generation_config=settings, streamer=streamer)
    return output[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def _score_batch(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Likelihood]:
    import torch

    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = pad(rows, model.device, left=True)
    kept = max(map(len, answers)) + 1
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=min(kept, ids.shape[1]),
            use_cache=False,
        )
    # The last position predicts what would follow the answer.
    logits = output.logits[:, -kept:-1].float()
    logs, best = logits.log_softmax(dim=-1), logits.argmax(dim=-1)
    # In front of a short answer ids of soft tokens may stand, which have no logit.
    targets = ids[:, -logits.shape[1] :].clamp(max=logits.shape[-1] - 1)
    taken = logs.gather(-1, targets[..., None])[..., 0]
    return [
        Likelihood(
            log_probabilities=tuple(taken[row, -len(answer) :].tolist()),
            greedy=tuple((best[row] == targets[row])[-len(answer) :].tolist()),
        )
        for row, answer in enumerate(answers)
    ]


def pad(
    rows: Sequence[Sequence[int]], device: Any, *, fill: int = 0, left: bool = False
) -> tuple["Tensor", "Tensor"]:
    """Return ids and mask, both `[B, T]`, of rows that begin together, or end together if `left`.

    Rows that begin together need no positions: causal attention never sees what is behind them.
    """
    import torch

    length = max(map(len, rows))

    def padded(row: Sequence[int], value: int) -> list[int]:
        gap = [value] * (length - len(row))
        return [*gap, *row] if left else [*row, *gap]

    ids = [padded(row, fill) for row in rows]
    mask = [padded([1] * len(row), 0) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def rows_of_logits(model: Any, most: int, positions: int) -> int:
    """Return how many rows of so many positions have logits that a pass can hold."""
    width: int = model.config.get_text_config().vocab_size
    return max(1, min(most, _MAX_LOGITS // (width * positions)))


def run_batches(
    run: Callable[[Sequence[int]], list[_Row]],
    lengths: Sequence[int],
    *,
    batch_size: int,
    on_done: Callable[[int], object],
) -> list[_Row]:
    """Return what `run` makes of each index into `lengths`, run in batches of like length.

    `lengths` are tokens, `on_done` is given the number of indices after each batch.

    Raises:
        ConfigurationError: The memory does not hold one of them.
    """
    found: dict[int, _Row] = {}
    for batch in plan_batches(lengths, batch_size=batch_size, max_new_tokens=0):
        found.update(zip(batch, run_in_memory(run, batch, lengths.__getitem__), strict=True))
        on_done(len(batch))
    return [found[index] for index in range(len(lengths))]


def run_in_memory(
    run: Callable[[Sequence[_Item]], list[_Row]],
    batch: Sequence[_Item],
    length: Callable[[_Item], int],
) -> list[_Row]:
    """Run a batch; what is too much for the memory at once goes in halves.

    Args:
        run: takes prompts and returns a result for each.
        batch: the prompts, or what stands for them.
        length: says how many tokens one has.

    Raises:
        ConfigurationError: the memory does not hold one prompt.
    """
    import torch

    if len(batch) == 1:
        with fits_memory(f"one prompt of {length(batch[0])} tokens"):
            return run(batch)
    try:
        return run(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the error holds the frames that hold the tensors.
    torch.cuda.empty_cache()
    half = len(batch) // 2
    first = run_in_memory(run, batch[:half], length)
    return first + run_in_memory(run, batch[half:], length)


@contextlib.contextmanager
def fits_memory(what: str) -> Iterator[None]:
    """Say in one line what did not fit, should the memory run out while the block runs.

    Raises:
        ConfigurationError: It does.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigurationError(
            f"out of memory on {what}; free some of it, load the model as bfloat16 or use a "
            "larger device"
        ) from error
