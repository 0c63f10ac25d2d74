import torch

from duet_unlearn.distill.config import LOSS_NAMES
from duet_unlearn.distill.losses import LOSSES, cached_logits, huber, row_means


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


def test_every_loss_passes_gradcheck():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(2, 3, 5, dtype=torch.float64)
    for loss in LOSSES.values():
        assert torch.autograd.gradcheck(lambda x, f=loss: f(x, teacher, delta=0.7), (student,))


def test_all_tokens_cached_is_the_dense_loss():
    torch.manual_seed(1)
    student, teacher = 4 * torch.randn(2, 3, 11), 4 * torch.randn(2, 3, 11)
    token_ids = teacher.argsort(dim=-1, descending=True)
    sparse = huber(cached_logits(student, token_ids), teacher.gather(-1, token_ids), delta=1.0)
    dense = torch.nn.functional.huber_loss(student, teacher, reduction="none").mean(-1)
    torch.testing.assert_close(sparse, dense)


def test_losses_are_single_precision_for_half_precision_logits():
    student = torch.tensor([[300.0, 1.0]], dtype=torch.bfloat16)
    loss = huber(student, torch.tensor([[300.25, 1.0]]), delta=1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.25**2 / 4]))


def test_row_means_ignore_masked_positions_and_their_gradients():
    losses = torch.tensor([[1.0, 3.0, float("nan")], [2.0, 100.0, 100.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    means = row_means(losses, mask)
    torch.testing.assert_close(means, torch.tensor([2.0, 2.0]))
    means.sum().backward()
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(losses.grad, expected)


def test_the_configuration_offers_the_losses_there_are():
    assert tuple(LOSSES) == LOSS_NAMES
