import random
from pathlib import Path

import pytest
import torch

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.evaluation.answers import (
    cut_at_end,
    generate_answers,
    plan_batches,
    score_references,
)

NEW_TOKENS = 12


def random_ids(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(7, 384) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def naive_greedy(model, prompt: list[int], ends: list[int]) -> list[int]:
    """One row, no padding, no KV cache, no `generate`."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            best = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in ends:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    return load_model(tiny_model)


def common_ends(model, prompts: list[list[int]]) -> list[int]:
    """Two ids that the model says often, so that many answers end, each at its own place."""
    said = [t for p in prompts for t in naive_greedy(model, p, [])[2:6]]
    return sorted(set(said), key=lambda t: (-said.count(t), t))[:6]


@pytest.mark.parametrize("with_ends", [False, True])
def test_batches_of_any_size_give_the_naive_answers(model, with_ends: bool) -> None:
    prompts = random_ids(40)
    ends = common_ends(model, prompts) if with_ends else []
    expected = [naive_greedy(model, prompt, ends) for prompt in prompts]
    if with_ends:
        assert len({len(answer) for answer in expected}) > 3  # answers do end, and apart
    for batch_size in (1, 32):
        answers = generate_answers(
            model, prompts, eos_token_ids=ends, max_new_tokens=NEW_TOKENS, batch_size=batch_size
        )
        assert answers == expected


def test_sampling_defaults_of_the_folder_change_nothing(model, tiny_model: Path) -> None:
    prompts = random_ids(8)
    settings = {"eos_token_ids": [1], "max_new_tokens": NEW_TOKENS, "batch_size": 8}
    expected = generate_answers(model, prompts, **settings)
    wild = load_model(tiny_model)
    wild.generation_config.do_sample = True
    wild.generation_config.temperature = 5.0
    wild.generation_config.repetition_penalty = 50.0
    wild.generation_config.suppress_tokens = [answer[0] for answer in expected]
    assert generate_answers(wild, prompts, **settings) == expected


def test_batches_are_sorted_by_length_and_bounded() -> None:
    lengths = [5, 90, 10, 30, 30, 7]
    batches = plan_batches(lengths, batch_size=3, max_new_tokens=10, max_tokens=100)
    # 100 // (90 + 10) = 1 row; 100 // (30 + 10) = 2 rows; 100 // (10 + 10) = 5, so 3.
    assert batches == [[1], [3, 4], [2, 5, 0]]
    assert plan_batches([500], batch_size=3, max_new_tokens=10, max_tokens=100) == [[0]]
    assert plan_batches([], batch_size=3, max_new_tokens=10) == []


def test_answers_are_cut_before_the_first_end() -> None:
    assert cut_at_end([5, 6, 2, 7, 2], [2, 9]) == [5, 6]
    assert cut_at_end([2, 5], [2]) == []
    assert cut_at_end([5, 6], []) == [5, 6]


def test_a_frozen_head_is_not_copied_for_each_row(tiny_model: Path) -> None:
    """Only the head has as many outputs as the vocabulary has tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class BatchedProducts(TorchDispatchMode):
        widths: list[int]

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten.bmm.default:
                self.widths.append(arguments[1].shape[-1])
            return function(*arguments, **(options or {}))

    frozen = load_model(tiny_model).requires_grad_(False)
    seen = BatchedProducts()
    seen.widths = []
    with seen:
        generate_answers(frozen, random_ids(4), eos_token_ids=[], max_new_tokens=2, batch_size=4)
    assert frozen.config.vocab_size not in seen.widths
    assert not frozen.get_output_embeddings()._forward_pre_hooks


def naive_logs(model, prompt: list[int], answer: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    logs = logits.log_softmax(dim=-1)
    return [float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]


def test_batches_of_any_size_give_the_naive_log_probabilities(model) -> None:
    prompts, answers = random_ids(20, 30, 0), random_ids(20, 9, 1)
    expected = [naive_logs(model, p, a) for p, a in zip(prompts, answers, strict=True)]
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
