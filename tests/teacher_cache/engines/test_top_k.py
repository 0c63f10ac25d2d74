import numpy as np
import pytest
import torch

from duet_unlearn.teacher_cache.engines import top_k
from duet_unlearn.teacher_cache.engines.top_k import select_top_k


def naive(row: list[float], k: int) -> tuple[list[int], list[float]]:
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return order, [row[i] for i in order]


@pytest.fixture(params=["numpy", "torch"])
def select(request: pytest.FixtureRequest) -> object:
    """The CPU path, and the GPU path run on a CPU."""
    if request.param == "numpy":
        return lambda logits, k: top_k._select_numpy(logits.numpy(), k)
    return lambda logits, k: tuple(t.numpy() for t in top_k._select_torch(logits, k))


def test_ties_go_to_the_smaller_id_also_at_the_edge(select) -> None:
    logits = torch.tensor(
        [
            [1.0, 3.0, 2.0, 3.0, 2.0, 2.0],
            [-1.0, -2.0, -1.0, -2.0, -3.0, -2.0],
            [0.0, -0.0, 0.0, -0.0, -1.0, 1.0],
            [5.0, 5.0, 5.0, 5.0, 5.0, 5.0],
        ]
    )

    ids, values = select(logits, 4)

    assert ids.tolist() == [[1, 3, 2, 4], [0, 2, 1, 3], [5, 0, 1, 2], [0, 1, 2, 3]]
    assert values.tolist() == [[3, 3, 2, 2], [-1, -1, -2, -2], [1, 0, 0, 0], [5, 5, 5, 5]]
    assert ids.dtype == np.int32
    assert values.dtype == np.float32


@pytest.mark.parametrize("k", [1, 7, 40, 41])
def test_agrees_with_sorting_by_logit_then_id(select, k: int) -> None:
    # Few distinct values, as in bfloat16: ties everywhere.
    logits = torch.randint(-4, 4, (50, 41), generator=torch.Generator().manual_seed(k)) / 2

    ids, values = select(logits, k)

    for row, row_ids, row_values in zip(logits.tolist(), ids, values, strict=True):
        assert (row_ids.tolist(), row_values.tolist()) == naive(row, k)


def test_infinities_order_like_numbers(select) -> None:
    inf = float("inf")
    ids, values = select(torch.tensor([[0.0, -inf, inf, 1e38, -1e38]]), 5)
    assert ids.tolist() == [[2, 3, 0, 4, 1]]
    assert values[0, 0] == inf


def test_logsumexp_covers_the_whole_row_and_nan_shows_in_it() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, float("nan"), 0.0, 2.0]])

    ids, values, logsumexp = select_top_k(logits, 2)

    assert ids.shape == values.shape == (2, 2)
    assert logsumexp[0].item() == pytest.approx(np.log(4), abs=1e-6)
    assert torch.isnan(logsumexp[1])
