"""Losses against numbers by hand, against an oracle in plain Python, and at their limits."""

import math

import pytest
import torch

from duet_unlearn.distill.config import LOSS_OPTIONS
from duet_unlearn.distill.losses import (
    LOSSES,
    Loss,
    huber,
    jsd,
    kl,
    mse,
    reverse_kl,
    row_means,
    scores_of,
    tail_logsumexp,
    with_cross_entropy,
)

# What the losses without a tail, and those with one, compare in the tests by hand.
HALF_HALF, QUARTERS = [0.5, 0.5], [0.75, 0.25]
LOG_3 = math.log(3)


def log_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_huber_by_hand():
    student = torch.tensor([[1.0, 2.0, 5.0], [0.0, -3.0, 0.0]])
    teacher = torch.tensor([[1.5, 2.0, 2.0], [0.0, 0.0, 1.0]])
    # Distances .5, 0, 3 and 0, 3, 1 at delta 1: .125, 0, 2.5 and 0, 2.5, .5.
    expected = torch.tensor([2.625 / 3, 3.0 / 3])
    torch.testing.assert_close(huber(student, teacher, delta=1.0), expected)
    # At delta 2 the large distances give 2 * (3 - 1) = 4, and 1 is still a square.
    expected = torch.tensor([(0.125 + 4) / 3, (4 + 0.5) / 3])
    torch.testing.assert_close(huber(student, teacher, delta=2.0), expected)


def test_huber_pulls_with_the_distance_and_never_more_than_delta():
    student = torch.tensor([[0.25, 7.0, -7.0, 0.0]], requires_grad=True)
    huber(student, torch.zeros(1, 4), delta=0.5).sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.25, 0.5, -0.5, 0.0]]) / 4)


def test_mse_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[1.5, 2.0, 2.0]])
    torch.testing.assert_close(mse(student, teacher), torch.tensor([9.25 / 3]))


def test_divergences_by_hand():
    # p = (3/4, 1/4) is the teacher, q = (1/2, 1/2) the student; a shift of logits changes nothing.
    teacher, student = log_of(*QUARTERS) + 3, log_of(*HALF_HALF) - 2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl(student, teacher).item() == pytest.approx(expected)
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert reverse_kl(student, teacher).item() == pytest.approx(expected)
    # m = (5/8, 3/8)
    expected = 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)) + 0.5 * (
        0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    )
    assert jsd(student, teacher).item() == pytest.approx(expected)


def test_temperature_by_hand():
    # Logits (2 log 3, 0) at temperature 2 are (log 3, 0): 3/4 and 1/4. The factor is 2 * 2.
    teacher, student = torch.tensor([2 * LOG_3, 0.0]), torch.zeros(2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl(student, teacher, temperature=2.0).item() == pytest.approx(expected)
    expected = 4 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert reverse_kl(student, teacher, temperature=2.0).item() == pytest.approx(expected)


def test_tail_bucket_by_hand():
    # Teacher: 1/2 and 1/4 of the mass cached, 1/4 beyond. Student: 1/4, 1/4 and 1/2.
    teacher, logsumexp = log_of(0.5, 0.25) + 7, torch.tensor(7.0, dtype=torch.float64)
    student = log_of(0.25, 0.25, 0.5) - 1
    loss = Loss(name="kl-tail")(student, teacher, logsumexp)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    # m = (3/8, 1/4, 3/8)
    expected = 0.5 * (0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)) + 0.5 * (
        0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3)
    )
    assert Loss(name="jsd")(student, teacher, logsumexp).item() == pytest.approx(expected)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def oracle(loss: Loss, student: list[float], teacher: list[float], ids: list[int]) -> float:
    """One position from whole rows of logits, in plain Python."""
    pairs = [(student[i], teacher[i]) for i in ids]
    if loss.name == "mse":
        return sum((s - t) ** 2 for s, t in pairs) / len(ids)
    if loss.name == "huber":
        sizes, d = [abs(s - t) for s, t in pairs], loss.delta
        return sum(e * e / 2 if e <= d else d * (e - d / 2) for e in sizes) / len(ids)
    if loss.name in ("kl", "reverse-kl"):
        q = softmax([s for s, _ in pairs], loss.temperature)
        p = softmax([t for _, t in pairs], loss.temperature)
        return loss.temperature**2 * (divergence(p, q) if loss.name == "kl" else divergence(q, p))
    both = []
    for side in (teacher, student):
        dense = softmax(side)
        kept = [dense[i] for i in ids]
        rest = sum(x for i, x in enumerate(dense) if i not in ids)
        both.append([*kept, rest] if len(ids) < len(side) else kept)
    p, q = both
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return divergence(p, q) if loss.name == "kl-tail" else (divergence(p, m) + divergence(q, m)) / 2


EVERY_LOSS = [
    Loss(name="huber", delta=0.7),
    Loss(name="mse"),
    Loss(name="kl"),
    Loss(name="kl", temperature=2.5),
    Loss(name="kl-tail"),
    Loss(name="reverse-kl"),
    Loss(name="reverse-kl", temperature=0.5),
    Loss(name="jsd"),
]
every_loss = pytest.mark.parametrize(
    "loss", EVERY_LOSS, ids=lambda loss: f"{loss.name}-{loss.temperature:g}"
)


@every_loss
@pytest.mark.parametrize("top_k", [1, 4, 11])
def test_every_loss_equals_the_oracle_up_to_all_tokens(loss, top_k):
    """At K = V the oracle is the dense loss."""
    torch.manual_seed(top_k)
    student, teacher = 3 * torch.randn(2, 3, 11).double(), 3 * torch.randn(2, 3, 11).double()
    ids = teacher.argsort(dim=-1, descending=True)[..., :top_k]
    scores = scores_of(student, ids, tail=loss.tail)
    found = loss(scores, teacher.gather(-1, ids), teacher.logsumexp(-1))
    for place in [(b, t) for b in range(2) for t in range(3)]:
        expected = oracle(
            loss, student[place].tolist(), teacher[place].tolist(), ids[place].tolist()
        )
        assert found[place].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_loss
@pytest.mark.parametrize("top_k", [4, 7])
def test_every_loss_passes_gradcheck(loss, top_k):
    torch.manual_seed(0)
    student = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(2, 3, 7, dtype=torch.float64)
    ids = teacher.argsort(dim=-1, descending=True)[..., :top_k]

    def of(logits: torch.Tensor) -> torch.Tensor:
        scores = scores_of(logits, ids, tail=loss.tail)
        return loss(scores, teacher.gather(-1, ids), teacher.logsumexp(-1))

    assert torch.autograd.gradcheck(of, (student,))


@every_loss
def test_every_loss_is_zero_with_no_gradient_where_both_agree(loss):
    torch.manual_seed(2)
    logits = (4 * torch.randn(3, 50)).requires_grad_()
    ids = logits.argsort(dim=-1, descending=True)[..., :5]
    teacher = logits.detach()
    scores = scores_of(logits, ids, tail=loss.tail)
    found = loss(scores, teacher.gather(-1, ids), teacher.logsumexp(-1))
    torch.testing.assert_close(found, torch.zeros(3), atol=1e-6, rtol=0)
    found.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3, 50), atol=1e-5, rtol=0)


@every_loss
@pytest.mark.parametrize("teacher_top", [1e4, 20.0])
@pytest.mark.parametrize("student_top", [1e4, -1e4])
@pytest.mark.parametrize("top_k", [3, 8])
def test_every_loss_is_finite_at_extremes(loss, teacher_top, student_top, top_k):
    teacher = torch.zeros(1, 8)
    teacher[0, 0] = teacher_top
    student = torch.zeros(1, 8)
    student[0, 0] = student_top
    student.requires_grad_()
    ids = torch.arange(top_k).unsqueeze(0)
    found = loss(
        scores_of(student, ids, tail=loss.tail), teacher.gather(-1, ids), teacher.logsumexp(-1)
    )
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert found.item() >= 0
    assert torch.isfinite(student.grad).all()


@every_loss
def test_masses_that_rounding_pushed_above_one_are_harmless(loss):
    teacher = torch.tensor([[18.32, 17.9, 3.3]]).half().float()
    logsumexp = torch.tensor([18.0])  # the cached tokens hold more than e^18
    student = torch.zeros(1, 9, requires_grad=True)
    scores = scores_of(student, torch.tensor([[0, 1, 2]]), tail=loss.tail)
    found = loss(scores, teacher, logsumexp)
    found.sum().backward()
    assert found.item() > 0
    assert torch.isfinite(student.grad).all()


def test_tail_of_the_logsumexp():
    logits = log_of(0.5, 0.3) + 2
    tail = tail_logsumexp(logits, torch.tensor(2.0, dtype=torch.float64))
    assert tail.item() == pytest.approx(2 + math.log(0.2))
    # None is left: a millionth of all there is.
    tail = tail_logsumexp(logits, torch.tensor(2 + math.log(0.8)))
    assert tail.item() == pytest.approx(2 + math.log(0.8) + math.log(1e-6), abs=1e-4)


def test_a_small_tail_keeps_its_gradient_in_single_precision():
    # The tail holds e^-30 of the student and half of the teacher: all of it has to come up.
    student = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    scores = scores_of(student, torch.tensor([[0]]), tail=True)
    loss = Loss(name="kl-tail")(scores, torch.zeros(1, 1), torch.tensor([math.log(2)]))
    loss.sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.25, -0.25]]))


def test_losses_are_single_precision_for_half_precision_logits():
    student = torch.tensor([[300.0, 1.0]], dtype=torch.bfloat16)
    loss = huber(student, torch.tensor([[300.25, 1.0]]), delta=1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.25**2 / 4]))
    for each in EVERY_LOSS:
        scores = scores_of(student, torch.tensor([[0]]), tail=each.tail)
        assert each(scores, torch.zeros(1, 1), torch.ones(1)).dtype == torch.float32


def test_row_means_ignore_masked_positions_and_their_gradients():
    losses = torch.tensor([[1.0, 3.0, float("nan")], [2.0, 100.0, 100.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    means = row_means(losses, mask)
    torch.testing.assert_close(means, torch.tensor([2.0, 2.0]))
    means.sum().backward()
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(losses.grad, expected)


def test_the_configuration_offers_the_losses_there_are():
    assert list(LOSSES) == list(LOSS_OPTIONS)
    assert {loss.name for loss in EVERY_LOSS} == set(LOSS_OPTIONS)


@pytest.mark.parametrize("width", [6, 3])
def test_cross_entropy_is_that_of_all_logits_wherever_the_token_is(width):
    # The first token is cached, the second (where there are others) is not; 3 cached of `width`.
    torch.manual_seed(0)
    logits = torch.randn(2, width, dtype=torch.float64, requires_grad=True)
    cached = torch.tensor([[0, 2, 1], [2, 0, 1]])
    response = torch.tensor([2, width - 1])

    wanted = torch.cat([response[:, None], cached], dim=1)
    scores = scores_of(logits, wanted, tail=True)
    absent = torch.zeros_like(cached, dtype=torch.bool)
    both, found = with_cross_entropy(scores, cached, response, absent)

    expected = torch.nn.functional.cross_entropy(logits, response, reduction="none")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(both, scores_of(logits, cached, tail=True))
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", list(LOSSES))
def test_places_without_a_token_have_no_influence(name: str) -> None:
    torch.manual_seed(0)
    loss = Loss(name=name, delta=0.5, temperature=1.7)
    student_TV = torch.randn(3, 30, dtype=torch.float64, requires_grad=True)
    teacher_TV = 3 * torch.randn(3, 30, dtype=torch.float64)
    best = teacher_TV.topk(6, dim=-1)
    counts = [6, 2, 1]
    absent = torch.arange(6) >= torch.tensor(counts)[:, None]
    logits_TK = best.values.masked_fill(absent, -torch.inf)
    ids_TK = torch.where(absent, best.indices[:, :1], best.indices)
    logsumexp_T = teacher_TV.logsumexp(-1)

    found = loss(scores_of(student_TV, ids_TK, tail=loss.tail), logits_TK, logsumexp_T)

    (gradient,) = torch.autograd.grad(found.sum(), student_TV)
    for t, count in enumerate(counts):
        scores = scores_of(student_TV[t], ids_TK[t, :count], tail=loss.tail)
        expected = loss(scores, logits_TK[t, :count], logsumexp_T[t])
        torch.testing.assert_close(found[t], expected)
        (own,) = torch.autograd.grad(expected, student_TV)
        torch.testing.assert_close(gradient[t], own[t])
