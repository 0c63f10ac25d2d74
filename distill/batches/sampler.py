"""Which rows each optimizer step trains on, decided by seed, epoch and cache alone.

The order of an epoch and its cut into steps are computed for all processes together; a process
then takes its share of every step. So one process or many, with gradient accumulation or without,
train on the same queries in the same steps. Rows are shuffled within windows of a few row groups,
because a cache decodes a row group at a time and may not fit in memory.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.objectives.base import IN_VIEW, Order
from duet_unlearn.teacher_cache.build.plan import merge_in_proportion
from duet_unlearn.teacher_cache.format.schema import SPLITS

FORGET, RETAIN, TRAIN = range(len(SPLITS))

# Row groups of each split that are mixed at a time. Two windows, and two more while moving on,
# stay within what the reader keeps decoded.
WINDOW_GROUPS = 4

PLAIN = -1
"""In place of a view's index: the query as it is."""

RowIndices = npt.NDArray[np.int64]


class Draw(NamedTuple):
    """One sequence to train on."""

    row: int
    """Row of the cache."""
    view: int
    """Index of the view, or `PLAIN`."""
    weight: float
    """Share of the step's loss; all draws of a step sum to 1 over all processes."""


def epoch_order(
    splits: npt.NDArray[np.uint8], row_groups: Sequence[range], *, seed: int, epoch: int
) -> RowIndices:
    """Return every row once, in the order of one epoch.

    Any stretch of n rows holds the splits in the cache's proportion, off by less than a row of each
    at its ends.

    Args:
        splits: Split of every row, `[N]`, its place in `SPLITS`; others are left out.
        row_groups: Rows that are decoded together.
        seed: Of the run.
        epoch: Number of the epoch, from 0.

    Returns:
        `[N]` row indices.
    """
    generator = np.random.default_rng([seed, epoch])
    merged = np.empty(0, np.int64)
    for split in (FORGET, RETAIN, TRAIN):
        groups = [np.flatnonzero(splits[g.start : g.stop] == split) + g.start for g in row_groups]
        rows = _shuffle_windows([group for group in groups if len(group)], generator)
        merged = merge_in_proportion(merged, rows)
    return merged


def _shuffle_windows(groups: Sequence[RowIndices], generator: np.random.Generator) -> RowIndices:
    order = generator.permutation(len(groups))
    windows = [
        generator.permutation(
            np.concatenate([groups[i] for i in order[start : start + WINDOW_GROUPS]])
        )
        for start in range(0, len(order), WINDOW_GROUPS)
    ]
    return np.concatenate(windows) if windows else np.empty(0, np.int64)


def sampler_of(
    order: Order, config: RunConfig, *, process: int = 0, num_processes: int = 1
) -> "StepSampler":
    """Return the sampler of a run's rows for one of its processes."""
    return StepSampler(
        order,
        seed=config.seed,
        batch_size=int(config.batch_size),
        accumulation=config.gradient_accumulation_steps,
        process=process,
        num_processes=num_processes,
    )


def split_evenly(draws: Sequence[Draw], parts: int) -> list[list[Draw]]:
    """Cut a step into parts whose sizes differ by at most one.

    A part that would be empty, at the end of an epoch, repeats the step's first draw with weight
    zero: every process has to run the same number of passes.
    """
    bounds = [len(draws) * part // parts for part in range(parts + 1)]
    pieces = [list(draws[a:b]) for a, b in itertools.pairwise(bounds)]
    return [piece or [draws[0]._replace(weight=0.0)] for piece in pieces]


class StepSampler(Sampler[list[Draw]]):
    """Batch sampler: one list of draws for each forward pass of this process.

    With views, every row of a step is drawn twice: plain, and behind one view that is drawn anew
    each epoch, out of those that it has a target in. A row without any is drawn plain alone.

    Args:
        order: The rows and views to draw from.
        seed: Of the run.
        batch_size: Rows an optimizer step, all processes together.
        accumulation: Forward passes a step on each process.
        process: Index of this process.
        num_processes: How many processes share each step.
    """

    def __init__(
        self,
        order: Order,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.order = order
        self.seed = seed
        self.rows_per_step = batch_size
        self.accumulation = accumulation
        self.process = process
        self.num_processes = num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the last may hold fewer rows."""
        drawn = int((self.order.splits != IN_VIEW).sum())
        return -(-drawn // self.rows_per_step)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in self.steps():
            pieces = split_evenly(step, self.accumulation * self.num_processes)
            yield from pieces[self.process :: self.num_processes]

    def steps(self) -> Iterator[list[Draw]]:
        """Yield the draws of each optimizer step of the epoch, all processes together."""
        order, weights = self.order, self.order.view_weights
        rows = epoch_order(order.splits, order.row_groups, seed=self.seed, epoch=self.epoch)
        # A generator of its own: adding views must not change the order of the rows.
        generator = np.random.default_rng([self.seed, self.epoch, 1])
        if weights is None:
            views = generator.integers(max(order.num_views, 1), size=len(rows))
        else:
            shares = np.array(weights, np.float64) / np.sum(weights)
            views = generator.choice(order.num_views, size=len(rows), p=shares)
        if order.view_mask is not None:
            views = self._redraw(rows, views, order.view_mask)
        for start in range(0, len(rows), self.rows_per_step):
            part = slice(start, start + self.rows_per_step)
            yield self._draws(rows[part].tolist(), views[part].tolist())

    def _redraw(
        self, rows: RowIndices, views: RowIndices, mask: npt.NDArray[np.bool_]
    ) -> RowIndices:
        """Replace views that a row has no target in.

        Where views weigh the same and are spread evenly over rows, each keeps its share of the
        draws; a heavier one loses some. The new one is among the views that only some rows have, so
        that those of all rows are not drawn more often; where the row has none of these, among any
        that it has; `PLAIN` where it has none at all.
        """
        places = np.flatnonzero(~mask[rows, views])
        allowed_NV = mask[rows[places]]
        some_NV = allowed_NV & ~mask.all(axis=0)
        allowed_NV = np.where(some_NV.any(axis=1, keepdims=True), some_NV, allowed_NV)
        weights = self.order.view_weights or (1.0,) * self.order.num_views
        sums_NV = np.where(allowed_NV, weights, 0.0).cumsum(axis=1)
        # Of its own again: rows that have the view drawn first keep it.
        drawn = np.random.default_rng([self.seed, self.epoch, 2]).random(len(places))
        found = (sums_NV > (drawn * sums_NV[:, -1])[:, None]).argmax(axis=1)
        views = views.copy()
        views[places] = np.where(sums_NV[:, -1] > 0, found, PLAIN)
        return views

    def _draws(self, rows: list[int], views: list[int]) -> list[Draw]:
        if self.order.num_views == 0:
            return [Draw(row, PLAIN, 1.0 / len(rows)) for row in rows]
        draws: list[Draw] = []
        for row, view in zip(rows, views, strict=True):
            shapes = {PLAIN, view}
            draws += [Draw(row, shape, 1.0 / len(rows) / len(shapes)) for shape in sorted(shapes)]
        return draws
