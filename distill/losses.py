"""Losses between the student's and the teacher's signals at the cached token ids.

Shapes: B rows (queries or views of them), T positions, K cached tokens, V the head's width, S what
a loss compares at a position: the K tokens, or K + 1 where a last bucket stands for all the others.
Every function computes in float32 whatever dtype the logits come in (float64 stays); those that
compare two sides take the student's and the teacher's, `[..., S]` both, and return one value a
position, `[...]`.

A distribution over the K tokens and a tail is the softmax of K + 1 numbers: the K raw logits and
the logsumexp of all others. So the losses with a tail are those without, on one bucket more.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from duet_unlearn.distill.config import LOSS_OPTIONS

# How far below the largest logit one stands that holds no mass, at any temperature that is in use.
_NOTHING = 1e5
# Float32 cannot tell a smaller mass from none when it is what the K tokens leave of 1.
_TAIL_FLOOR = 1e-6


def huber(student_logits: Tensor, teacher_logits: Tensor, *, delta: float) -> Tensor:
    """Huber distance of raw logits, averaged over the K cached tokens (DUET, Eq. 3).

    With `d = student - teacher`, an entry is `d**2 / 2` up to `|d| = delta` and
    `delta * (|d| - delta / 2)` beyond. No softmax is taken, so a shift of all logits counts.

    Args:
        student_logits: `[..., K]`, any floating dtype.
        teacher_logits: `[..., K]`, same shape.
        delta: Where the square turns into a line, in logits, positive.

    Returns:
        One value a position, `[...]` float32.
    """
    distance = (single(student_logits) - single(teacher_logits)).abs()
    near = distance.clamp(max=delta)
    # Written without a branch: near * (distance - near / 2) is both cases at once.
    return (near * (distance - 0.5 * near)).mean(dim=-1)


def mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared distance of raw logits; twice what Huber is within its delta.

    Args:
        student_logits: `[..., K]`, any floating dtype.
        teacher_logits: `[..., K]`, same shape.

    Returns:
        One value a position, `[...]` float32.
    """
    return (single(student_logits) - single(teacher_logits)).square().mean(dim=-1)


def kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward divergence `KL(teacher || student)` of softmaxes over the last dimension.

    Args:
        student_logits: `[..., S]`, any floating dtype.
        teacher_logits: `[..., S]`, same shape.
        temperature: Divides both sides' logits; the result is multiplied by its square, so that
            gradients keep their size (Hinton, Vinyals, Dean 2015).

    Returns:
        Nats a position, `[...]` float32.
    """
    log_student = _log_softmax(student_logits, temperature)
    log_teacher = _log_softmax(teacher_logits, temperature)
    return temperature**2 * _divergence(log_teacher, log_student)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Reverse divergence `KL(student || teacher)`; the temperature is as in `kl`."""
    log_student = _log_softmax(student_logits, temperature)
    log_teacher = _log_softmax(teacher_logits, temperature)
    return temperature**2 * _divergence(log_student, log_teacher)


def jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence `KL(p || m) / 2 + KL(q || m) / 2`, `m = (p + q) / 2`.

    As JensUn uses it (arXiv 2509.02820). It is at most log 2, so no query pulls without bound.

    Args:
        student_logits: `[..., S]`, any floating dtype.
        teacher_logits: `[..., S]`, same shape.

    Returns:
        Nats a position, `[...]` float32.
    """
    log_student = _log_softmax(student_logits, 1.0)
    log_teacher = _log_softmax(teacher_logits, 1.0)
    log_middle = torch.logaddexp(log_student, log_teacher) - math.log(2)
    return 0.5 * (_divergence(log_teacher, log_middle) + _divergence(log_student, log_middle))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (single(logits) / temperature).log_softmax(dim=-1)


def _divergence(log_of: Tensor, log_from: Tensor) -> Tensor:
    return (log_of.exp() * (log_of - log_from)).sum(dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossKind:
    """A loss that `--loss` offers."""

    function: Callable[..., Tensor]
    """`function(student, teacher, **options)`: `[..., S]` twice to `[...]`."""
    tail: bool = False
    """Whether it compares all tokens beyond the K as one more bucket."""
    softmax: bool = True
    """Whether it compares distributions; else it is a mean over the tokens' raw logits."""


LOSSES: Mapping[str, LossKind] = MappingProxyType(
    {
        "huber": LossKind(function=huber, softmax=False),
        "mse": LossKind(function=mse, softmax=False),
        "kl": LossKind(function=kl),
        "kl-tail": LossKind(function=kl, tail=True),
        "reverse-kl": LossKind(function=reverse_kl),
        "jsd": LossKind(function=jsd, tail=True),
    }
)
"""The losses by the name that `--loss` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A loss with its settings, as a trainer calls it.

    The teacher's tail is what its K tokens leave of the cached logsumexp. Rounding to float16 moves
    a mass by up to 1%, the tail with it: caches for these losses are better built with
    `--logit-dtype float32`.
    """

    name: str
    """Key of `LOSSES`."""
    delta: float = 1.0
    temperature: float = 1.0

    @property
    def tail(self) -> bool:
        """Whether the student's scores need their tail, and so its whole vocabulary."""
        return LOSSES[self.name].tail

    def __call__(
        self, student_scores: Tensor, teacher_logits: Tensor, teacher_logsumexp: Tensor
    ) -> Tensor:
        """Return one loss a position.

        Args:
            student_scores: `[..., K]` raw logits, and with a tail `[..., K + 1]`: the last is the
                logsumexp of all other tokens, minus infinity where there are none.
            teacher_logits: `[..., K]` raw logits, minus infinity in places without a token: there
                the student's scores have no influence.
            teacher_logsumexp: `[...]` over the teacher's full vocabulary.

        Returns:
            `[...]` float32.
        """
        kind = LOSSES[self.name]
        option = LOSS_OPTIONS[self.name]
        options = {} if option is None else {option: getattr(self, option)}
        absent = teacher_logits.isneginf()
        if not kind.softmax:
            student, teacher = (s.masked_fill(absent, 0) for s in (student_scores, teacher_logits))
            # The mean is over tokens that are there.
            counts = absent.shape[-1] - absent.sum(dim=-1)
            return kind.function(student, teacher, **options) * (absent.shape[-1] / counts)
        teacher = _without(single(teacher_logits), absent)
        if not kind.tail:
            student = _without(single(student_scores), absent)
            return kind.function(student, teacher, **options)
        cached = _without(single(student_scores[..., :-1]), absent)
        student = torch.cat([cached, single(student_scores[..., -1:])], dim=-1)
        tail = tail_logsumexp(teacher, teacher_logsumexp).unsqueeze(-1)
        teacher = torch.cat([teacher, tail], dim=-1)
        no_tail = student[..., -1:].isneginf()
        empty = torch.cat([torch.zeros_like(absent), no_tail], dim=-1)
        sides = (_without(side, empty) for side in (student, teacher))
        return kind.function(*sides, **options)


def _without(logits: Tensor, absent: Tensor) -> Tensor:
    """Put some logits, not all of a position, so far below the others that they hold no mass."""
    largest = logits.detach().masked_fill(absent, -math.inf).amax(dim=-1, keepdim=True)
    return torch.where(absent, largest - _NOTHING, logits)


def tail_logsumexp(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """Return the logsumexp of the tokens beyond the K, from that of all tokens.

    Args:
        logits: `[..., K]` raw logits of the K tokens.
        logsumexp: `[...]` over the full vocabulary. Where rounding leaves the K tokens more than
            all there is, or less than a millionth short of it, the tail is that millionth.

    Returns:
        `[...]` float32, always finite.
    """
    whole = single(logsumexp)
    log_mass = (single(logits).logsumexp(dim=-1) - whole).clamp(max=math.log1p(-_TAIL_FLOOR))
    return whole + (-torch.expm1(log_mass)).log()


def scores_of(logits: Tensor, token_ids: Tensor, *, tail: bool) -> Tensor:
    """Pick what a loss compares from whole rows of logits.

    Args:
        logits: The student's raw logits at the scored positions, `[..., V]`.
        token_ids: Cached token ids, `[..., K]` int64, each smaller than V.
        tail: Whether to add the logsumexp of all other tokens.

    Returns:
        `[..., K]` float32, or `[..., K + 1]` with the tail in the last place.
    """
    cached = single(logits.gather(-1, token_ids))
    if not tail:
        return cached
    # Summed over the others themselves: as a difference to the whole, a small tail would drown in
    # rounding, and its gradient in the division by it.
    others = single(logits).scatter(-1, token_ids, -math.inf)
    return torch.cat([cached, others.logsumexp(dim=-1, keepdim=True)], dim=-1)


def with_cross_entropy(
    scores: Tensor, token_ids: Tensor, response_ids: Tensor, absent: Tensor
) -> tuple[Tensor, Tensor]:
    """Split what a student gives the response's tokens from what a loss compares.

    Args:
        scores: The student's at the response's token and the cached ones, and its tail beyond all
            of them: `[..., 1 + K + 1]`.
        token_ids: Cached token ids, `[..., K]`.
        response_ids: The token that follows at each position, `[...]`.
        absent: Which of the cached places have no token, `[..., K]`; their ids stand elsewhere too.

    Returns:
        Scores `[..., K + 1]` at the cached tokens, with the tail beyond them; and the cross-entropy
        of the response's token in nats, `[...]`.
    """
    token, rest = scores[..., 0], scores[..., -1]
    cached = scores[..., 1:-1].masked_fill(absent, -math.inf)
    outside = (token_ids != response_ids[..., None]).all(dim=-1)
    tail = torch.where(outside, torch.logaddexp(rest, token), rest)
    both = torch.cat([cached, tail[..., None]], dim=-1)
    return both, both.logsumexp(dim=-1) - token


def row_means(losses_BT: Tensor, position_mask_BT: Tensor) -> Tensor:
    """Average each row's loss over its own positions, so that long rows weigh no more.

    Args:
        losses_BT: One loss a position, `[B, T]`.
        position_mask_BT: True where the row has a position, `[B, T]`; at least one a row.

    Returns:
        `[B]`. What stands at a masked position, NaN too, has no influence, on gradients either.
    """
    kept = torch.where(position_mask_BT, losses_BT, torch.zeros_like(losses_BT))
    return kept.sum(dim=-1) / position_mask_BT.sum(dim=-1)


def single(values: Tensor) -> Tensor:
    """Return float32 values; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
