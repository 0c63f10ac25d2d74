"""Rows of a batch whose prompts begin alike run together; what they share is computed once.

Prompts of one chat template begin with the same header, and those in one few-shot view with the
same examples: often more tokens than the query has. So a batch is cut into groups of rows. Of each
group the common beginning passes the model once, as keys and values that all its rows attend to,
and then the rest of every row, padded to the longest rest of the group alone. Attention is causal:
what stands behind a token never changes its hidden state, so losses and gradients are those of the
padded batch up to rounding, for a fraction of its tokens.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What a further pass costs, in tokens: on a GPU, starting the kernels of every layer.
PASS_TOKENS = {"cpu": 32}
PASS_TOKENS_ELSEWHERE = 1024
# Looking further back than this for the start of a group would take longer than it saves.
_MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Some rows of a batch."""

    rows: tuple[int, ...]
    shared: int
    """Tokens that all of them begin with, 0 where these are not computed apart."""


def group_prompts(
    prompts: Sequence[Sequence[int]], widths: Sequence[int], *, pass_tokens: int
) -> list[PromptGroup]:
    """Cut the rows of a batch into groups so that few tokens pass the model.

    Args:
        prompts: Of each row the tokens in front of its first scored position.
        widths: Of each row the columns from its first token to the end of the batch.
        pass_tokens: What a pass of the model costs beside its tokens.
    """
    rows = range(len(prompts))
    orders = sorted(rows, key=lambda i: widths[i]), sorted(rows, key=lambda i: tuple(prompts[i]))
    cuts = [_cheapest_cut(order, prompts, widths, pass_tokens) for order in orders]
    return min(cuts, key=lambda cut: cut[0])[1]


def _cheapest_cut(
    order: Sequence[int],
    prompts: Sequence[Sequence[int]],
    widths: Sequence[int],
    pass_tokens: int,
) -> tuple[int, list[PromptGroup]]:
    """Return the cost in tokens and the groups, stretches of an order, of its cheapest cut."""
    # A stretch shares what each two neighbors in it share.
    common = [_common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    best: list[tuple[int, list[PromptGroup]]] = [(0, [])]
    for stop in range(1, len(order) + 1):
        shared, width = len(prompts[order[stop - 1]]), 0
        options = []
        for start in range(stop - 1, max(-1, stop - 1 - _MOST_ROWS), -1):
            width = max(width, widths[order[start]])
            if start < stop - 1:
                shared = min(shared, common[start])
            rows = stop - start
            apart = rows * width + pass_tokens
            once = shared + rows * (width - shared) + 2 * pass_tokens
            options.append(
                (best[start][0] + min(apart, once), start, shared if once < apart else 0)
            )
        cost, start, shared = min(options)
        best.append((cost, [*best[start][1], PromptGroup(tuple(order[start:stop]), shared)]))
    return best[-1]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def may_share(model: nn.Module) -> bool:
    """Say whether a model's keys and values of a prompt are all that later tokens need of it.

    Not so with a sliding window, with a recurrent state, or where activations are recomputed.
    """
    if (config := getattr(model, "config", None)) is None:
        return False
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else not getattr(config, "sliding_window", 0)
    return (
        full
        and not getattr(model, "_is_stateful", False)
        and not getattr(model, "is_gradient_checkpointing", False)
    )


def passes(
    model: nn.Module, inputs: Mapping[str, Any]
) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Yield the rows of each group and its batch, keys and values of the shared tokens in it.

    Args:
        model: The student itself: around it, several processes would have to agree on passes.
        inputs: A batch from `collate`: `[B, L]`, prompts padded in front.
    """
    groups, starts_B = group_batch(inputs)
    for group in groups:
        yield group.rows, _batch_of(model, inputs, group, starts_B)


def group_batch(inputs: Mapping[str, Any]) -> tuple[list[PromptGroup], Tensor]:
    """Return the groups of a batch, and of each row the column of its first token, `[B]`."""
    ids_BL = inputs["input_ids"]
    starts_B = inputs["attention_mask"].argmax(dim=1)
    scored = ids_BL.shape[1] - inputs["position_mask"].shape[1]
    prompts = [
        row[start:scored] for row, start in zip(ids_BL.tolist(), starts_B.tolist(), strict=True)
    ]
    groups = group_prompts(
        prompts,
        (ids_BL.shape[1] - starts_B).tolist(),
        pass_tokens=PASS_TOKENS.get(ids_BL.device.type, PASS_TOKENS_ELSEWHERE),
    )
    return groups, starts_B


def _batch_of(
    model: nn.Module, inputs: Mapping[str, Any], group: PromptGroup, starts_B: Tensor
) -> dict[str, Any]:
    rows = torch.tensor(group.rows, device=starts_B.device)
    batch = {name: value[rows] for name, value in inputs.items() if isinstance(value, Tensor)}
    first_G = starts_B[rows] + group.shared
    first = int(first_G.min())
    mask_GL = batch["attention_mask"]
    if group.shared:
        longest = int(first_G.argmin())
        beginning = batch["input_ids"][longest : longest + 1, first - group.shared : first]
        # No position passes the head: a frozen one would be copied whole for a single one.
        nowhere = torch.zeros(0, dtype=torch.long, device=beginning.device)
        cache = model(input_ids=beginning, use_cache=True, logits_to_keep=nowhere).past_key_values
        cache.batch_repeat_interleave(len(rows))
        batch["past_key_values"] = cache
        columns = torch.arange(mask_GL.shape[1], device=mask_GL.device)
        mask_GL = mask_GL * (columns >= first_G.unsqueeze(1))
    for name in ("input_ids", "position_ids"):
        batch[name] = batch[name][:, first:]
    ones = mask_GL.new_ones(len(rows), group.shared)
    batch["attention_mask"] = torch.cat([ones, mask_GL[:, first:]], dim=1)
    return batch
