"""Intervals and paired tests, against SciPy-free closed forms."""

import math

import numpy as np
import pytest

from duet_unlearn.evaluation.statistics import compare, summarize, summarize_all


def test_a_mean_has_its_count_and_an_interval_around_it() -> None:
    scores = np.array([1.0] * 30 + [0.0] * 70 + [math.nan] * 5)
    number = summarize(scores)
    assert number is not None
    assert (number.mean, number.count) == (pytest.approx(30.0), 100)
    # 1.96 * sqrt(0.3 * 0.7 / 100) is 9.0 points.
    assert number.low == pytest.approx(30 - 9, abs=1.5)
    assert number.high == pytest.approx(30 + 9, abs=1.5)
    assert summarize(scores) == number


def test_many_queries_need_no_resampling() -> None:
    number = summarize(np.tile([0.0, 0.0, 0.0, 1.0], 1000))
    assert number is not None
    half = 196 * math.sqrt(0.25 * 0.75 / 4000)
    assert (number.low, number.high) == pytest.approx((25 - half, 25 + half), abs=0.01)
    alike = compare(np.tile([0.5, 0.1, 0.2], 1000), np.tile([0.1, 0.5, 0.2], 1000))
    assert alike is not None
    assert alike.p == pytest.approx(1.0)


def test_equal_scores_promise_no_certainty_and_none_no_number() -> None:
    number = summarize(np.full(20, 0.5))
    assert number is not None
    open_share = 1 - 0.025 ** (1 / 20)  # what 20 queries may have missed could score 0 or 1
    assert (number.low, number.mean) == (pytest.approx(50 * (1 - open_share)), 50.0)
    assert number.high == pytest.approx(50 * (1 + open_share))
    assert summarize(np.array([math.nan])) is None
    none_of_144 = summarize(np.zeros(144))
    assert none_of_144 is not None
    # The chance to see none of 144 at a true share of 2.5 points is 2.5%.
    assert (1 - none_of_144.high / 100) ** 144 == pytest.approx(0.025)
    all_of_two = summarize(np.ones(2))
    assert all_of_two is not None
    assert (all_of_two.low, all_of_two.high) == pytest.approx((100 * 0.025**0.5, 100))
    assert compare(np.array([math.nan]), np.array([1.0])) is None


@pytest.mark.parametrize("count", [64, 3000])
def test_one_answer_of_many_is_no_surer_than_none(count: int) -> None:
    none, one = np.zeros(count), np.eye(count)[0]
    zero, few = summarize_all(none), summarize_all(one)
    all_of, most = summarize_all(1 - none), summarize_all(1 - one)
    assert (zero.low, few.low) == (0.0, 0.0)
    assert few.high > zero.high > 300 / count
    assert most.low < all_of.low < 100 - 300 / count
    unchanged, changed = compare(none, none), compare(one, none)
    assert unchanged is not None
    assert changed is not None
    assert changed.high > unchanged.high > 300 / count
    assert changed.low < 0


def test_mcnemar_by_hand() -> None:
    # Six queries changed, all the same way: 2 / 2 ** 6.
    difference = compare(np.array([0.0] * 6 + [1.0] * 4), np.array([1.0] * 10))
    assert difference is not None
    assert difference.mean == pytest.approx(-60.0)
    assert difference.p == pytest.approx(2 / 64)
    same = compare(np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    assert same is not None
    assert same.p == 1.0


def test_differences_that_are_all_alike_promise_no_certainty() -> None:
    gone = compare(np.zeros(64), np.ones(64))
    assert gone is not None
    assert (gone.low, gone.mean) == (-100.0, -100.0)
    assert -100 < gone.high < -80
    same = compare(np.full(64, 0.5), np.full(64, 0.5))
    assert same is not None
    assert same.low < 0 < same.high
    assert same.p == 1.0


def test_a_few_queries_prove_nothing() -> None:
    for count in (1, 2, 3):
        found = compare(np.full(count, 0.5), np.zeros(count))
        assert found is not None
        assert found.p > 0.2
    rare = summarize(np.array([1.0] + [0.0] * 2999))
    assert rare is not None
    assert rare.low == 0.0


def test_flipped_signs_tell_a_shift_from_noise() -> None:
    generator = np.random.default_rng(1)
    base = generator.random(80)
    shifted = compare(base * 0.5, base)
    noisy = compare(base + generator.normal(0, 0.1, 80), base)
    assert shifted is not None
    assert noisy is not None
    assert shifted.p < 0.01
    assert shifted.high < 0
    assert noisy.p > 0.05
    assert noisy.low < 0 < noisy.high


def test_kolmogorov_smirnov_against_known_values() -> None:
    low, high = np.arange(100) / 256, np.arange(20, 120) / 256
    found = compare(low, high)
    assert found is not None
    # 20 of 100 lie below the others' least: D is 0.2, and scipy.stats.kstwobign.sf(0.2 * 50**0.5)
    # is 0.0366.
    assert found.ks_p == pytest.approx(0.0366, abs=1e-4)
    same = compare(low, low[::-1].copy())
    assert same is not None
    assert same.ks_p == 1.0
