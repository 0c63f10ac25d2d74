import math

import pytest
import torch
from torch import nn

from duet_unlearn.distill.model.noise import perturb


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def noised(alpha, beta, seed=3):
    torch.manual_seed(0)
    model = Tied()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    perturb(model, alpha=alpha, beta=beta, seed=seed)
    return before, {name: p.detach() for name, p in model.named_parameters()}


def test_vectors_shrink_and_matrices_get_noise_of_the_stated_scale():
    alpha, beta = 0.4, 0.5
    before, after = noised(alpha, beta)
    assert torch.equal(after["norm.weight"], before["norm.weight"] * (1 - alpha))
    noise = (after["embed.weight"] - (1 - alpha) * before["embed.weight"]) / (alpha * beta)
    bound = math.sqrt(6 / (50 + 8))
    assert float(noise.abs().max()) <= bound * (1 + 1e-4)
    # A uniform draw's standard deviation is its bound over sqrt(3); 400 numbers here.
    assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert abs(float(noise.mean())) < 0.2 * bound


def test_every_expert_gets_the_noise_of_a_matrix_of_its_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(torch.zeros(6, 40, 20))
    perturb(model, alpha=1.0, beta=1.0, seed=3)
    bound = math.sqrt(6 / (40 + 20))
    assert float(model.experts.up.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_tied_matrix_is_changed_once():
    before, after = noised(0.5, 0.0)
    assert torch.equal(after["embed.weight"], before["embed.weight"] * 0.5)


def test_same_seed_same_noise_and_another_seed_another():
    first, second, other = (noised(0.3, 0.1, seed)[1]["embed.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_alpha_zero_changes_nothing():
    before, after = noised(0.0, 0.1)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_frozen_parameters_stay():
    model = Tied()
    model.norm.requires_grad_(False)
    kept = model.norm.weight.clone()
    perturb(model, alpha=0.7, beta=0.1, seed=0)
    assert torch.equal(model.norm.weight, kept)


def test_low_precision_weights_take_noise_drawn_in_float32():
    torch.manual_seed(0)
    single, half = Tied(), Tied().to(torch.bfloat16)
    half.load_state_dict({k: v.to(torch.bfloat16) for k, v in single.state_dict().items()})
    for model in (single, half):
        perturb(model, alpha=0.5, beta=1.0, seed=9)
    assert torch.allclose(half.embed.weight.float(), single.embed.weight, atol=0.02)
