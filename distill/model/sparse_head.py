"""The student's head, computed for what a loss compares and for nothing else.

A plain forward pass gives logits `[B, T, V]`, of which a loss reads K at each position, and where
it has a tail, one sum over the others. `StudentScores` lends the head another forward for the
length of one pass of the model, so whatever wraps it (DDP, FSDP, autocast, adapters) works as ever:

- without a tail only the K cached rows of the head are multiplied, `K / V` of the work;
- with a tail the logits of some positions at a time are made, reduced and dropped, and made again
  in the backward pass: time for memory.

Positions that are padding do not pass the head at all. A head that is no plain linear layer, or
whose logits the model goes on to change (soft caps, scales), is left alone.

Shapes: N positions that are not padding, H hidden size, V vocabulary, K cached tokens, S = K or
K + 1 scores.
"""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from duet_unlearn.distill.losses import scores_of, single
from duet_unlearn.distill.model.token_tree import TokenTree, may_merge, merge

logger = logging.getLogger(__name__)

# Numbers that one piece of work holds at a time: 64 MiB in float32.
PIECE_NUMBERS = 2**24
# Rows that show what a model bears, and how far its scores in a tree may be from those in rows,
# relative: a position or a mask that is not heeded shows in the first digit.
_TRIED_ROWS = 4
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.03
_SINGLE_BYTES = 4
_TREE_NAMES = frozenset({"position_ids", "attention_mask", "logits_to_keep"})


class CachedRows(torch.autograd.Function):
    """Logits of the cached tokens alone: `logits[n, k] = hidden[n] . weight[token_ids[n, k]]`."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, token_ids_NK: Tensor) -> Tensor:
        """Return `[N, K]` in float32 (float64 stays)."""
        ctx.save_for_backward(hidden_NH, weight_VH, token_ids_NK)
        hidden = single(hidden_NH)
        logits = hidden.new_empty(token_ids_NK.shape)
        for part in _pieces(token_ids_NK, hidden.shape[1]):
            rows_nKH = single(weight_VH[token_ids_NK[part]])
            logits[part] = torch.bmm(rows_nKH, hidden[part].unsqueeze(-1)).squeeze(-1)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of hidden states and weight; the weight's is dense, as for a matmul."""
        hidden_NH, weight_VH, token_ids_NK = ctx.saved_tensors
        hidden = single(hidden_NH)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight_VH, dtype=hidden.dtype) if ctx.needs_input_grad[1] else None
        )
        for part in _pieces(token_ids_NK, hidden.shape[1]):
            if grad_hidden is not None:
                rows_nKH = single(weight_VH[token_ids_NK[part]])
                grad_hidden[part] = torch.bmm(grad_NK[part].unsqueeze(1), rows_nKH).squeeze(1)
            if grad_weight is not None:
                outer_nKH = grad_NK[part].unsqueeze(-1) * hidden[part].unsqueeze(1)
                grad_weight.index_add_(0, token_ids_NK[part].flatten(), outer_nKH.flatten(0, 1))
        return _as(grad_hidden, hidden_NH), _as(grad_weight, weight_VH), None


class ScoresWithTail(torch.autograd.Function):
    """Logits of the cached tokens and the logsumexp of all others, some positions at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, token_ids_NK: Tensor) -> Tensor:
        """Return `[N, K + 1]` in float32 (float64 stays)."""
        positions, top_k = token_ids_NK.shape
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        scores_NS = hidden_NH.new_empty(positions, top_k + 1, dtype=dtype)
        for part in _pieces(token_ids_NK[:, :1], len(weight_VH)):
            logits_nV = single(hidden_NH[part] @ weight_VH.T)
            scores_NS[part, :-1] = logits_nV.gather(-1, token_ids_NK[part])
            logits_nV.scatter_(-1, token_ids_NK[part], -math.inf)
            scores_NS[part, -1] = logits_nV.logsumexp(dim=-1)
        ctx.save_for_backward(hidden_NH, weight_VH, token_ids_NK, scores_NS[:, -1:])
        return scores_NS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NS: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of hidden states and weight, from logits that are made again."""
        hidden_NH, weight_VH, token_ids_NK, tail_N1 = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight_VH, dtype=grad_NS.dtype) if ctx.needs_input_grad[1] else None
        )
        # Without a tail its logsumexp is minus infinity, and minus infinity less itself no number.
        tail_N1 = tail_N1.clamp(min=torch.finfo(tail_N1.dtype).min)
        for part in _pieces(token_ids_NK[:, :1], len(weight_VH)):
            logits_nV = single(hidden_NH[part] @ weight_VH.T)
            logits_nV.scatter_(-1, token_ids_NK[part], -math.inf)
            grad_nV = logits_nV.sub_(tail_N1[part]).exp_().mul_(grad_NS[part, -1:])
            # Added to zeros: a token may be there twice.
            grad_nV.scatter_add_(-1, token_ids_NK[part], grad_NS[part, :-1])
            grad_nV = grad_nV.to(weight_VH.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_nV @ weight_VH
            if grad_weight is not None:
                if grad_weight.dtype == grad_nV.dtype:
                    grad_weight.addmm_(grad_nV.T, hidden_NH[part])
                else:
                    grad_weight += grad_nV.T @ hidden_NH[part]
        return grad_hidden, _as(grad_weight, weight_VH), None


def _pieces(token_ids: Tensor, width: int) -> Iterator[slice]:
    """Cut `[N, K]` into ranges of positions whose `K * width` numbers fit in one piece."""
    positions, each = token_ids.shape
    step = max(1, PIECE_NUMBERS // (each * width))
    for start in range(0, positions, step):
        yield slice(start, start + step)


def _as(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)


def _forward(
    model: nn.Module,
    inputs: Mapping[str, Any],
    forward_names: AbstractSet[str],
    tree: TokenTree | None,
) -> Tensor:
    """Run a batch, or the same batch as a tree; return what the model calls logits.

    Args:
        model: The student, wrapped for several processes or not.
        inputs: A batch from `collate`.
        forward_names: What the student's own forward takes: models without rotary positions take
            no position_ids, a few old ones no logits_to_keep.
        tree: The same batch as a tree, to be run instead.

    Returns:
        `[B, ..., X]` or of a tree `[1, ..., X]`; where the model knows logits_to_keep, few other
        logits than those of scored positions were ever computed.
    """
    if tree is not None:
        arguments = tree.arguments(model)
    else:
        arguments = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "position_ids": inputs["position_ids"],
            "logits_to_keep": inputs["position_mask"].shape[1],
            "use_cache": False,
        }
    known = {name: value for name, value in arguments.items() if name in forward_names}
    logits: Tensor = model(**known).logits
    return logits


def _scored(output_BLX: Tensor, inputs: Mapping[str, Any], tree: TokenTree | None) -> Tensor:
    """Return what stands at the scored positions, `[N, X]`.

    The output is of all columns or of the last T; of a tree, of its scored columns alone.
    """
    if tree is None:
        mask_BT = inputs["position_mask"]
        return output_BLX[:, -mask_BT.shape[1] :][mask_BT]
    return output_BLX[0]


class StudentScores:
    """What a loss compares of the student, `[B, T, S]` for a batch.

    Args:
        model: The student, not wrapped.
        tail: Whether the loss needs the logsumexp of the tokens that are not cached.
        lean: Whether to look for a head that can be computed in parts, and to merge the rows of a
            batch; tests and measurements compare with the plain way.
    """

    def __init__(self, model: nn.Module, *, tail: bool, lean: bool = True) -> None:
        self._tail = tail
        self._forward_names = _forward_names(model)
        self._head = _linear_head(model) if lean else None
        self._merges = lean and self._forward_names >= _TREE_NAMES and may_merge(model)
        self._tried = not lean

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Run a batch from `collate` through the student, wrapped or not.

        Returns:
            `[B, T, K]` or, with a tail, `[B, T, K + 1]` float32, differentiable. What stands at a
            masked position has no meaning.
        """
        if isinstance(model, nn.DataParallel):  # its copies would share one head and one tree
            self._head, self._merges = None, False
        if not self._tried:
            self._tried = True
            self._try(model, {name: value[:_TRIED_ROWS] for name, value in inputs.items()})
        tree = merge(inputs) if self._merges else None
        scores_NS = self._scores(model, inputs, tree)
        mask_BT = inputs["position_mask"]
        scores_BTS = scores_NS.new_zeros(*mask_BT.shape, scores_NS.shape[-1])
        scores_BTS[mask_BT] = scores_NS
        return scores_BTS

    def _scores(
        self, model: nn.Module, inputs: Mapping[str, Any], tree: TokenTree | None
    ) -> Tensor:
        """Return `[N, S]` for the scored positions."""
        if self._head is not None:
            return self._lean(self._head, model, inputs, tree)[0]
        logits_NV = _scored(_forward(model, inputs, self._forward_names, tree), inputs, tree)
        return scores_of(logits_NV, _scored_ids(inputs), tail=self._tail)

    def _lean(
        self,
        head: nn.Linear,
        model: nn.Module,
        inputs: Mapping[str, Any],
        tree: TokenTree | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the model's scores and the head's; they are the same unless something follows."""
        made: list[Tensor] = []

        def forward(hidden_BLH: Tensor) -> Tensor:
            if type(head.weight) not in (Tensor, nn.Parameter):  # a part of one, on this device
                return nn.Linear.forward(head, hidden_BLH)
            # Models that know no logits_to_keep hand every position to their head.
            hidden_NH = _scored(hidden_BLH, inputs, tree)
            made.append(self._head_scores(head.weight, hidden_NH, _scored_ids(inputs)))
            return made[-1][None].clone()  # FSDP takes no view

        # An attribute of the object hides the class's forward; hooks around it still run.
        vars(head)["forward"] = forward
        try:
            output = _forward(model, inputs, self._forward_names, tree)
        finally:
            del vars(head)["forward"]
        if not made:  # whole logits
            logits_NV = _scored(output, inputs, tree)
            return scores_of(logits_NV, _scored_ids(inputs), tail=self._tail), None
        return output[0], made[-1]

    def _head_scores(self, weight_VH: Tensor, hidden_NH: Tensor, token_ids_NK: Tensor) -> Tensor:
        device = hidden_NH.device.type
        if self._tail and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        function = ScoresWithTail if self._tail else CachedRows
        with torch.autocast(device, enabled=False):
            scores_NS: Tensor = function.apply(hidden_NH, weight_VH, token_ids_NK)  # type: ignore[no-untyped-call]
        return scores_NS

    @torch.no_grad()
    def _try(self, model: nn.Module, rows: Mapping[str, Any]) -> None:
        """Find out on a few rows what the model bears: a lean head, and a tree of tokens."""
        training = model.training
        model.eval()  # draws no random numbers, so a resumed run stays the same
        try:
            if self._head is not None and not self._hands_on(self._head, model, rows):
                self._head = None
                logger.info(
                    "the student's logits are more than its head's output: all of them are "
                    "computed at the scored positions"
                )
            if self._merges and not self._reads_trees(model, rows):
                self._merges = False
                logger.info(
                    "the student does not read a tree of tokens as it reads rows: what prompts "
                    "share is computed for each of them"
                )
        finally:
            model.train(training)

    def _hands_on(self, head: nn.Linear, model: nn.Module, rows: Mapping[str, Any]) -> bool:
        """Say whether the model calls its head, and returns what comes out as it is."""
        try:
            given, made = self._lean(head, model, rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what follows wants all V logits
            return False
        return made is not None and torch.equal(given, made.to(given.dtype))

    def _reads_trees(self, model: nn.Module, rows: Mapping[str, Any]) -> bool:
        """Say whether the model scores rows in a tree as it scores them padded, up to rounding."""
        padded = self._scores(model, rows, None)
        try:
            in_tree = self._scores(model, rows, merge(rows))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError):  # it expects a mask `[B, L]`
            return False
        rounded = (
            next(model.parameters()).dtype.itemsize < _SINGLE_BYTES
            or torch.is_autocast_enabled(padded.device.type)
            # accelerate's autocast is in the forward, and over when this is asked.
            or any(hasattr(module, "_original_forward") for module in model.modules())
        )
        tolerance = _TOLERANCE_HALF if rounded else _TOLERANCE
        return float((in_tree - padded).norm()) <= tolerance * float(padded.norm())


def _scored_ids(inputs: Mapping[str, Any]) -> Tensor:
    """Return the cached tokens of the scored positions, `[N, K]`."""
    token_ids_NK: Tensor = inputs["token_ids"][inputs["position_mask"]]
    return token_ids_NK


def _forward_names(model: nn.Module) -> frozenset[str]:
    """Return what the student's own forward takes; an adapter's takes anything and hands it on."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    return frozenset(inspect.signature(inner.forward).parameters)


def _linear_head(model: nn.Module) -> nn.Linear | None:
    """Return the head where it is a plain linear layer that nobody has put a hand on."""
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    if type(head) is not nn.Linear or getattr(head, "bias", head) is not None:
        return None
    return None if "forward" in vars(head) else head
