"""Progress of long work: a bar on a terminal, a log line every so often where there is none."""

import logging
import sys
import time
from typing import Any, Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

EVERY_SECONDS = 10.0
"""Time between two log lines."""


class Progress:
    """Counts what is done of a known amount of work, with its rate and the time left."""

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done = self._first = done
        self._started = self._logged = time.monotonic()
        self._logged_count: int | None = None
        self._notes = ""
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, **values: float) -> None:
        """Show numbers beside the count, such as a loss."""
        self._notes = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes, refresh=False)

    def update(self, count: int = 1) -> None:
        """Count work that was done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._logged >= EVERY_SECONDS:
            self._log()

    def close(self) -> None:
        """End the bar, or log the end of work that was long enough to be logged before."""
        if self._bar is not None:
            self._bar.close()
        elif self._logged_count not in (None, self._done):
            self._log()
        self._logged_count = None

    def _log(self) -> None:
        self._logged, self._logged_count = time.monotonic(), self._done
        rate = (self._done - self._first) / (self._logged - self._started)
        left = f", {_clock((self._total - self._done) / rate)} left" if rate else ""
        notes = f"; {self._notes}" if self._notes else ""
        logger.info(
            "%s: %d of %d %s, %.3g/s%s%s",
            self._what,
            self._done,
            self._total,
            self._unit,
            rate,
            left,
            notes,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
