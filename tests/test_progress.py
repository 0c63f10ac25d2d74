"""Where standard error is no terminal, long work says how far it is every so often."""

import logging

import pytest

from duet_unlearn import progress
from duet_unlearn.progress import Progress


def test_piped_progress_is_a_line_every_so_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), Progress("teacher", 90, "queries") as bar:
        for _ in range(9):
            now[0] += 4.0
            bar.note(loss=0.5)
            bar.update(10)
    assert [record.message for record in caplog.records] == [
        "teacher: 30 of 90 queries, 2.5/s, 0:24 left; loss 0.5",
        "teacher: 60 of 90 queries, 2.5/s, 0:12 left; loss 0.5",
        "teacher: 90 of 90 queries, 2.5/s, 0:00 left; loss 0.5",
    ]


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("teacher", 3, "queries") as bar:
        bar.update(3)
    assert not caplog.records


def test_what_was_done_before_counts_for_the_total_and_not_for_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), Progress("training", 100, "steps", done=80) as bar:
        now[0] += 20.0
        bar.update(10)
    assert caplog.records[0].message == "training: 90 of 100 steps, 0.5/s, 0:20 left"
