"""What every layer of a model holds at the last position of a prompt: one forward pass a prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from duet_unlearn.evaluation.answers import pad, run_batches

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastPosition:
    """Of one prompt, layer by layer, where the first token of the answer is decided."""

    states: Floats
    """`[L, D]`, behind the final norm: as the output head would read each layer."""
    ranks: tuple[int, ...]
    """Of the reference answer's first token among the vocabulary, 1 for the likeliest; `L`."""
    probabilities: tuple[float, ...]
    """Of the same token, `L`."""


def read_last_positions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    batch_size: int,
    on_read: Callable[[int], object] = lambda _count: None,
) -> list[LastPosition]:
    """Apply final norm and output head to the state of every layer (logit lens, nostalgebraist).

    The last layer's is what the model says itself, less a cap or a scale on logits that some
    architectures have: those leave ranks as they are.

    Args:
        model: A causal language model, in evaluation mode.
        prompts: Token ids, each of at least one token.
        tokens: Of each prompt the token to look for.
        batch_size: Most prompts of a forward pass.
        on_read: Is given the number of prompts after each pass.

    Raises:
        ConfigurationError: The memory does not hold one prompt.
    """

    def read(batch: Sequence[int]) -> list[LastPosition]:
        return _read_batch(model, [prompts[i] for i in batch], [tokens[i] for i in batch])

    lengths = [len(prompt) for prompt in prompts]
    return run_batches(read, lengths, batch_size=batch_size, on_done=on_read)


def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the norm between the last layer and the output head; without one, the identity.

    It is the last norm that stands beside the stack of layers, whatever its name.
    """
    for module in model.base_model.modules():
        beside = list(module.children())
        if any(isinstance(child, nn.ModuleList) for child in beside):
            norms = [child for child in beside if "norm" in type(child).__name__.lower()]
            return norms[-1] if norms else nn.Identity()
    return nn.Identity()


def output_vectors(model: Any, tokens: Sequence[int]) -> Floats:
    """Return the output head's row of each token, `[N, D]`."""
    rows = model.get_output_embeddings().weight[list(tokens)]
    found: Floats = rows.detach().double().cpu().numpy()
    return found


def _read_batch(
    model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
) -> list[LastPosition]:
    ids_BT, mask_BT = pad(prompts, model.device)
    rows, last = range(len(prompts)), [len(prompt) - 1 for prompt in prompts]
    norm, head = final_norm(model), model.get_output_embeddings()
    with torch.no_grad():
        output = model.base_model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            output_hidden_states=True,
            use_cache=False,
        )
        layers = [norm(states[rows, last]) for states in output.hidden_states[1:-1]]
        layers.append(output.last_hidden_state[rows, last])  # the model has normed it
        ranks, probabilities = [], []
        for states_BD in layers:
            logits_BV = head(states_BD).float()
            wanted_B = torch.tensor(tokens, device=logits_BV.device)[:, None]
            taken_B = logits_BV.gather(-1, wanted_B)
            ranks.append((1 + (logits_BV > taken_B).sum(dim=-1)).tolist())
            shares = (taken_B[:, 0] - logits_BV.logsumexp(dim=-1)).exp()
            probabilities.append(shares.tolist())
        states_LBD = torch.stack([states.double().cpu() for states in layers]).numpy()
    return [
        LastPosition(
            states=states_LBD[:, row],
            ranks=tuple(layer[row] for layer in ranks),
            probabilities=tuple(layer[row] for layer in probabilities),
        )
        for row in rows
    ]
