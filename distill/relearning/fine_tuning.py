"""Plain fine-tuning of a model in memory on pairs of prompt and answer, looked at on the way."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from duet_unlearn.data.models.adapters import new_adapter
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.distill.relearning.lessons import Pair
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.evaluation.answers import fits_memory, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

L = TypeVar("L")
IGNORED = -100
"""A label that transformers' loss passes over."""


def fine_tune(
    config: RelearnConfig,
    model: "PreTrainedModel",
    pairs: Sequence[Pair],
    look: Callable[[Any, int], L],
    *,
    rate: float,
    on_step: Callable[[int], object] = lambda _count: None,
) -> list[L]:
    """Train on the answers by AdamW at a constant rate; return what each look found.

    Pairs are drawn in rounds of whole batches, no pair twice in a round. Weight decay is PyTorch's
    default, 0.01.

    Args:
        config: Says after which steps to look, how many pairs a step has (all, where there are
            fewer), the rank of an adapter to train on all linear modules in place of all weights,
            and the seed, which decides the order and where an adapter starts.
        model: Changed in place.
        pairs: Token ids; the loss is the mean cross-entropy of the answers' tokens.
        look: Is given the model, in evaluation mode, and the number of steps done.
        rate: The learning rate.
        on_step: Is given 1 after each step.

    Raises:
        ConfigurationError: The memory does not hold a step, or peft is not installed.
    """
    steps, rank = config.listed_steps, config.lora_rank
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trained: Any = model.requires_grad_(True)
        if rank is not None:
            trained = new_adapter(model, r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        batches = draw_batches(len(pairs), config.batch_size, random.Random(config.seed))
        found = []
        for step in range(max(steps) + 1):
            if step in steps:
                if not all(bool(parameter.isfinite().all()) for parameter in parameters):
                    raise ConfigurationError(
                        f"rate {rate:g}: weights are no numbers after {step} steps; lower --rates, "
                        "or train in --dtype float32 or bfloat16"
                    )
                found.append(look(trained.eval(), step))
            if step == max(steps):
                break
            batch = [pairs[index] for index in next(batches)]
            trained.train()
            with fits_memory(f"a training step of {len(batch)} lessons"):
                loss: Any = answer_loss(trained, batch)
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            on_step(1)
    return found


def draw_batches(count: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield batches of indices without end, in rounds of whole batches: no index twice in one."""
    size = min(size, count)
    order: list[int] = []
    while True:
        if len(order) < size:
            order = rng.sample(range(count), count)
        batch, order = order[:size], order[size:]
        yield batch


def answer_loss(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens behind their prompts, in nats."""
    ids, mask = pad([[*prompt, *answer] for prompt, answer in pairs], model.device)
    targets = [[*[IGNORED] * len(prompt), *answer] for prompt, answer in pairs]
    labels, _ = pad(targets, model.device, fill=IGNORED)
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss
