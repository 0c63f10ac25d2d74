"""Likelihoods of given answers, against one row, no padding, one full softmax a pair."""

import random
from pathlib import Path

import pytest
import torch

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.likelihoods import score_references


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    return load_model(tiny_model)


def random_ids(count: int, longest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(7, 384) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def naive(model, prompt: list[int], answer: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    logs = logits.log_softmax(dim=-1)
    return [float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]


def test_batches_of_any_size_give_the_naive_log_probabilities(model) -> None:
    prompts, answers = random_ids(20, 30, 0), random_ids(20, 9, 1)
    expected = [naive(model, p, a) for p, a in zip(prompts, answers, strict=True)]
    for batch_size in (1, 7):
        found = score_references(model, prompts, answers, batch_size=batch_size)
        for likelihood, logs in zip(found, expected, strict=True):
            assert likelihood.log_probabilities == pytest.approx(logs, abs=1e-4)


def test_what_greedy_decoding_says_is_greedy_throughout(model) -> None:
    prompts = random_ids(6, 20, 2)
    said = generate_answers(model, prompts, eos_token_ids=[], max_new_tokens=8, batch_size=6)
    assert all(all(found.greedy) for found in score_references(model, prompts, said))
    other = [[*answer[:3], (answer[3] + 1) % 384] for answer in said]
    for found in score_references(model, prompts, other):
        assert found.greedy == (True, True, True, False)
