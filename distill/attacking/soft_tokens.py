"""Vectors that a model reads like tokens: the soft prompt, and the way to a suffix's gradient."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from duet_unlearn.distill.attacking.config import AttackConfig
from duet_unlearn.distill.attacking.prompts import Prompt
from duet_unlearn.distill.relearning.fine_tuning import answer_loss, draw_batches
from duet_unlearn.evaluation.answers import fits_memory


@contextlib.contextmanager
def soft_tokens(model: Any, vectors_ND: Tensor) -> Iterator[list[int]]:
    """Yield token ids behind the vocabulary that stand for vectors while the block runs.

    Whatever takes prompts of token ids then takes them too: a loss, a generation. The vectors are
    in the space of the input embedding's output; that is hooked.
    """
    embedding = model.get_input_embeddings()
    first: int = embedding.weight.shape[0]
    asked: list[Tensor] = []

    def take(_module: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        asked.append(inputs[0])
        return (inputs[0].where(inputs[0] < first, 0), *inputs[1:])

    def put(_module: object, _inputs: object, output: Tensor) -> Tensor:
        ids = asked.pop()
        soft = ids >= first
        if not soft.any():
            return output
        found = output.clone()
        found[soft] = vectors_ND[ids[soft] - first].to(output)
        return found

    hooks = [embedding.register_forward_pre_hook(take), embedding.register_forward_hook(put)]
    try:
        yield list(range(first, first + len(vectors_ND)))
    finally:
        for hook in hooks:
            hook.remove()


def embed(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Return what the input embedding makes of tokens, float32 `[N, D]`, on its device."""
    embedding = model.get_input_embeddings()
    ids = torch.tensor(token_ids, device=embedding.weight.device)
    found: Tensor = embedding(ids).detach().float()
    return found


def train_soft_prompt(
    config: AttackConfig,
    model: Any,
    prompts: Sequence[Prompt],
    *,
    on_step: Callable[[int], object] = lambda _count: None,
) -> Tensor:
    """Return vectors `[N, D]` that make answers likely (arXiv 2402.09063, 2104.08691).

    Adam on the mean cross-entropy of the answers' tokens; the model stays as it is. The vectors
    start as the embedding of the spacers of a suffix.

    Args:
        config: Its `soft_tokens` are N, `soft_steps` those of Adam, `soft_rate` its rate over the
            root mean square of what the embedding puts out (Gemma's scales its rows),
            `batch_size` the prompts of a step; the seed decides the order of the prompts.
        model: In evaluation mode, its weights frozen.
        prompts: What to answer.
        on_step: Is given 1 after each step.

    Raises:
        ConfigurationError: The memory does not hold a step.
    """
    spacers = prompts[0].inserted
    start = [spacers[at % len(spacers)] for at in range(config.soft_tokens)]
    vectors_ND = embed(model, start)
    weight = model.get_input_embeddings().weight.detach()
    gain = (vectors_ND.norm() / weight[start].float().norm()).item()
    scale = gain * weight.float().square().mean().sqrt().item()
    vectors_ND.requires_grad_(True)
    optimizer = torch.optim.Adam([vectors_ND], lr=config.soft_rate * scale)
    batches = draw_batches(len(prompts), config.batch_size, random.Random(config.seed))
    for _ in range(config.soft_steps):
        batch = [prompts[index] for index in next(batches)]
        with fits_memory(f"a step on {len(batch)} queries"), soft_tokens(model, vectors_ND) as ids:
            loss: Any = answer_loss(model, [(p.holding(ids), p.answer) for p in batch])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(1)
    return vectors_ND.detach()
