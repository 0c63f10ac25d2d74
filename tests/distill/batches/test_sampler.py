from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_unlearn.distill.batches.sampler import (
    PLAIN,
    WINDOW_GROUPS,
    Draw,
    StepSampler,
    epoch_order,
    split_evenly,
)
from duet_unlearn.distill.objectives.base import Order
from duet_unlearn.teacher_cache.build.plan import merge_in_proportion


def groups_of(size: int, rows: int) -> tuple[range, ...]:
    return tuple(range(start, min(start + size, rows)) for start in range(0, rows, size))


def splits_of(pattern: list[int]) -> np.ndarray:
    return np.array(pattern, np.uint8)


def sampler_of(
    pattern: list[int],
    *,
    num_views: int = 0,
    view_weights: Any = None,
    view_mask: Any = None,
    **settings: int,
) -> StepSampler:
    order = Order(
        splits=splits_of(pattern),
        row_groups=groups_of(3, len(pattern)),
        num_views=num_views,
        view_weights=view_weights,
        view_mask=view_mask,
    )
    return StepSampler(order, **{"seed": 0, "batch_size": 4, **settings})


def rows_of(step: list[Draw]) -> list[int]:
    return [draw.row for draw in step]


def test_merging_keeps_both_orders_and_spreads_them_evenly():
    merged = merge_in_proportion(np.array([7, 8]), np.array([1, 2, 3, 4]))
    assert merged.tolist() == [1, 2, 7, 3, 4, 8]
    assert merge_in_proportion(np.array([], np.int64), np.array([5, 6])).tolist() == [5, 6]
    assert merge_in_proportion(np.array([5, 6]), np.array([], np.int64)).tolist() == [5, 6]


@settings(max_examples=60)
@given(
    pattern=st.lists(st.integers(0, 1), min_size=1, max_size=80),
    group=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_once_in_proportion(pattern, group, seed, epoch):
    splits = splits_of(pattern)
    groups = groups_of(group, len(pattern))
    order = epoch_order(splits, groups, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(len(pattern)))
    retain_share = sum(pattern) / len(pattern)
    seen = np.cumsum(splits[order])
    expected = retain_share * np.arange(1, len(pattern) + 1)
    assert np.abs(seen - expected).max() < 1


def test_order_changes_with_seed_and_epoch_only():
    splits, groups = splits_of([0, 1] * 30), groups_of(8, 60)
    first = epoch_order(splits, groups, seed=3, epoch=1).tolist()
    assert first == epoch_order(splits, groups, seed=3, epoch=1).tolist()
    assert first != epoch_order(splits, groups, seed=3, epoch=2).tolist()
    assert first != epoch_order(splits, groups, seed=4, epoch=1).tolist()


def test_rows_come_from_a_window_of_row_groups():
    rows, size = 4000, 50
    splits = splits_of([0] * (rows // 2) + [1] * (rows // 2))
    groups = groups_of(size, rows)
    order = epoch_order(splits, groups, seed=0, epoch=0)
    touched = order // size
    decoded: list[int] = []  # a reader that keeps the 16 most recent groups
    reads = 0
    for group in touched.tolist():
        if group in decoded:
            decoded.remove(group)
        else:
            reads += 1
        decoded = [*decoded[-15:], group]
    assert reads == len(groups), "a row group was decoded twice"
    window = touched[: 2 * WINDOW_GROUPS * size]
    assert len(set(window.tolist())) == 2 * WINDOW_GROUPS
    assert len(set(touched[:20].tolist())) > WINDOW_GROUPS, "rows are not mixed over groups"


def test_splitting_evenly_fills_empty_parts_without_weight():
    draws = [Draw(5, PLAIN, 0.5), Draw(6, PLAIN, 0.5)]
    assert split_evenly(draws, 2) == [[draws[0]], [draws[1]]]
    filler = [Draw(5, PLAIN, 0.0)]
    parts = split_evenly(draws, 4)
    assert [part for part in parts if part != filler] == [[draws[0]], [draws[1]]]
    assert parts.count(filler) == 2


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_the_same_for_any_number_of_processes_and_passes(processes, accumulation):
    pattern = [0, 1, 1] * 10 + [0, 0]
    alone = sampler_of(pattern, batch_size=6, num_views=2)
    alone.set_epoch(2)
    shared = [
        sampler_of(
            pattern,
            batch_size=6,
            num_views=2,
            accumulation=accumulation,
            process=process,
            num_processes=processes,
        )
        for process in range(processes)
    ]
    for sampler in shared:
        sampler.set_epoch(2)
    passes = [list(sampler) for sampler in shared]
    assert {len(of_process) for of_process in passes} == {len(shared[0])}
    for number, step in enumerate(alone.steps()):
        part = slice(number * accumulation, (number + 1) * accumulation)
        together = [draw for of_process in passes for one in of_process[part] for draw in one]
        assert sorted(d for d in together if d.weight) == sorted(step)
        assert sum(draw.weight for draw in together) == pytest.approx(1)


def test_the_last_step_of_an_epoch_is_smaller_and_weighs_its_rows_more():
    steps = list(sampler_of([0, 1] * 5).steps())
    assert [len(step) for step in steps] == [4, 4, 2]
    assert {draw.weight for draw in steps[0]} == {0.25}
    assert {draw.weight for draw in steps[2]} == {0.5}


def test_views_stand_beside_the_plain_query_and_leave_the_order_alone():
    pattern = [0, 1] * 50
    plain = [rows_of(step) for step in sampler_of(pattern).steps()]
    viewed = list(sampler_of(pattern, num_views=3).steps())
    assert [rows_of(step)[::2] for step in viewed] == plain
    assert [rows_of(step)[1::2] for step in viewed] == plain
    assert {draw.view for step in viewed for draw in step[::2]} == {PLAIN}
    drawn = [draw.view for step in viewed for draw in step[1::2]]
    assert min(np.bincount(drawn, minlength=3)) > 20
    again = sampler_of(pattern, num_views=3)
    again.set_epoch(1)
    by_row = {draw.row: draw.view for step in viewed for draw in step[1::2]}
    assert any(by_row[d.row] != d.view for step in again.steps() for d in step[1::2])


def test_views_are_drawn_by_weight_for_forget_and_retain_alike():
    pattern = [0, 1] * 400
    sampler = sampler_of(pattern, num_views=3, view_weights=(1.0, 3.0, 4.0))
    steps = list(sampler.steps())
    for split in (0, 1):
        drawn = [d.view for step in steps for d in step[1::2] if pattern[d.row] == split]
        shares = np.bincount(drawn, minlength=3) / len(drawn)
        assert np.abs(shares - [1 / 8, 3 / 8, 4 / 8]).max() < 0.08
    assert [rows_of(step)[::2] for step in steps] == [
        rows_of(s) for s in sampler_of(pattern).steps()
    ]
    again = sampler_of(pattern, num_views=3, view_weights=(2.0, 6.0, 8.0))
    assert list(again.steps()) == steps


def test_views_keep_their_shares_where_each_row_has_some_of_them():
    pattern, rng = [0, 1] * 3000, np.random.default_rng(0)
    mask = np.ones((len(pattern), 7), np.bool_)
    for row in range(1, len(pattern), 2):  # retain rows have two of the last five views
        mask[row, 2:] = False
        mask[row, 2 + rng.permutation(5)[:2]] = True
    sampler = sampler_of(pattern, num_views=7, view_mask=mask)
    draws = [draw for step in sampler.steps() for draw in step if draw.view != PLAIN]
    for split in (0, 1):
        drawn = [draw.view for draw in draws if pattern[draw.row] == split]
        assert np.bincount(drawn) / len(drawn) == pytest.approx([1 / 7] * 7, abs=0.03)


def test_a_row_is_drawn_behind_the_views_that_it_has_targets_in_alone():
    pattern, weights = [0, 1] * 600, (1.0, 3.0, 4.0)
    every = np.ones((len(pattern), 3), np.bool_)
    whole = sampler_of(pattern, num_views=3, view_weights=weights)
    same = sampler_of(pattern, num_views=3, view_weights=weights, view_mask=every)
    assert list(whole.steps()) == list(same.steps())
    some = every.copy()
    some[1::4, 2] = False  # every second retain row lacks the last view
    some[3] = False  # and one has none
    steps = list(sampler_of(pattern, num_views=3, view_weights=weights, view_mask=some).steps())
    assert all(sum(draw.weight for draw in step) == pytest.approx(1) for step in steps)
    draws = [draw for step in steps for draw in step]
    assert [d.view for d in draws if d.row == 3] == [PLAIN]
    assert all(some[d.row, d.view] for d in draws if d.view != PLAIN)
    lacking = [d.view for d in draws if d.row % 4 == 1 and d.view != PLAIN]
    shares = np.bincount(lacking, minlength=3) / len(lacking)
    assert shares == pytest.approx([1 / 4, 3 / 4, 0], abs=0.1)
    # Rows that have all of them are drawn as before.
    kept = [d for step in whole.steps() for d in step if d.row % 4 != 1 and d.row != 3]
    assert [d for d in draws if d.row % 4 != 1 and d.row != 3] == kept
