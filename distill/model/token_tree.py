"""A batch as one tree of tokens: what its rows begin with alike is computed once.

Prompts of one chat template begin with the same header, those in one few-shot view with the same
examples, and a begun answer with the whole prompt of its query: together more tokens than the
queries have. So the rows of a batch are merged into a tree (a trie) that passes the model as one
sequence without padding. A token stands at the position of its depth and attends to itself and to
what leads to it from the root, the tree attention of SpecInfer (arXiv 2305.09781). Attention is
causal: what else is in the sequence never changes a token's hidden state, so losses and gradients
are those of the padded batch up to rounding, for a fraction of its tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attention costs the square of a tree's tokens; a batch of longer texts shares little anyway.
MOST_TOKENS = 4096
_EAGER, _MASKED = "eager", ("eager", "sdpa")


@dataclass(frozen=True, slots=True)
class TokenTree:
    """The rows of a batch as one sequence of L tokens with N scored positions."""

    input_ids: Tensor
    """`[1, L]`."""
    position_ids: Tensor
    """`[1, L]`: depth in the tree."""
    sees: Tensor
    """`[1, 1, L, L]` bool: whether a token (row) attends to another (column)."""
    columns: Tensor
    """`[N]`: where the scored positions stand, row by row of the batch."""

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return what the model's forward takes; its logits are then those of `columns`."""
        mask = self.sees
        if _attention(model) == _EAGER:  # which adds its mask to the scores
            lowest = torch.finfo(torch.float32).min
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, lowest)
        return {
            "input_ids": self.input_ids,
            "attention_mask": mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.columns,
            "use_cache": False,
        }


def merge(inputs: Mapping[str, Any]) -> TokenTree | None:
    """Merge the rows of a batch from `collate`; None where the tree would be too large.

    Args:
        inputs: `input_ids` and `attention_mask` `[B, L]`, and `position_mask` `[B, T]` of the last
            T columns.
    """
    ids_BL, mask_BL = inputs["input_ids"].tolist(), inputs["attention_mask"].bool().tolist()
    scored_BT = inputs["position_mask"].tolist()
    nodes: dict[tuple[int, int], int] = {}  # by parent and token
    tokens: list[int] = []
    parents: list[int] = []
    columns: list[int] = []
    for ids_L, mask_L, scored_T in zip(ids_BL, mask_BL, scored_BT, strict=True):
        node, path = -1, []
        for token, real in zip(ids_L, mask_L, strict=True):
            if real:
                parent, node = node, nodes.setdefault((node, token), len(tokens))
                if node == len(tokens):
                    tokens.append(token)
                    parents.append(parent)
            path.append(node)
        last = path[-len(scored_T) :]
        columns += [node for node, scored in zip(last, scored_T, strict=True) if scored]
    if len(tokens) > MOST_TOKENS:
        return None
    sees = np.eye(len(tokens), dtype=np.bool_)
    depths = np.zeros(len(tokens), np.int64)
    for node, parent in enumerate(parents):  # a parent comes before its children
        if parent >= 0:
            sees[node] |= sees[parent]
            depths[node] = depths[parent] + 1
    device = inputs["input_ids"].device
    return TokenTree(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.from_numpy(depths)[None].to(device),
        sees=torch.from_numpy(sees)[None, None].to(device),
        columns=torch.tensor(columns, device=device),
    )


def may_merge(model: nn.Module) -> bool:
    """Say whether a model may take a tree: every layer attends to all that a mask lets it see.

    Not so with a sliding window, a recurrent state or a kernel that knows causal masks alone.
    """
    if (config := getattr(model, "config", None)) is None:
        return False
    config = config.get_text_config()
    # GPT-Neo has a name of its own for it.
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    everywhere = {"full_attention", "global"}
    full = set(kinds) <= everywhere if kinds else not getattr(config, "sliding_window", 0)
    return full and not getattr(model, "_is_stateful", False) and _attention(model) in _MASKED


def _attention(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)
