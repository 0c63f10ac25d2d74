"""How likely a model finds given answers: one pass over prompt and answer, nothing is generated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.answers import plan_batches
from duet_unlearn.evaluation.measures import Likelihood

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_MAX_LOGITS = 1 << 27
"""Bound on rows x answer tokens x vocabulary of a batch: half a gigabyte of float32."""


def score_references(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
) -> list[Likelihood]:
    """Return how a model takes each answer behind its prompt, teacher-forced.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: token ids, each of at least one token.
        answers: the token ids of one answer a prompt, each of at least one token.
        batch_size: most pairs of a forward pass.

    Returns:
        For each pair the log-probability in nats of every token of the answer, and whether it is
        the most likely one there.

    Raises:
        ConfigurationError: the device's memory does not hold a batch.
    """
    import torch

    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    longest = max((len(answer) for answer in answers), default=1)
    width: int = model.config.get_text_config().vocab_size
    rows = max(1, min(batch_size, _MAX_LOGITS // (width * (longest + 1))))
    found: dict[int, Likelihood] = {}
    for batch in plan_batches(lengths, batch_size=rows, max_new_tokens=0):
        try:
            scored = _score_batch(model, [prompts[i] for i in batch], [answers[i] for i in batch])
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"{len(batch)} answers behind prompts of up to {lengths[batch[0]]} tokens do not "
                "fit into the memory of the GPU; use a smaller --batch-size"
            ) from error
        found.update(zip(batch, scored, strict=True))
    return [found[index] for index in range(len(prompts))]


def _score_batch(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Rows are padded on the left, so that all answers end at the last position."""
    import torch

    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    length, kept = max(map(len, rows)), max(map(len, answers)) + 1
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor(
        [[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device
    )
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=min(kept, length),
            use_cache=False,
        )
    # The last position predicts what would follow the answer.
    logits: Tensor = output.logits[:, -kept:-1].float()
    logs, best = logits.log_softmax(dim=-1), logits.argmax(dim=-1)
    targets = ids[:, -logits.shape[1] :]
    taken = logs.gather(-1, targets[..., None])[..., 0]
    return [
        Likelihood(
            log_probabilities=tuple(taken[row, -len(answer) :].tolist()),
            greedy=tuple((best[row] == targets[row])[-len(answer) :].tolist()),
        )
        for row, answer in enumerate(answers)
    ]
