"""Every error this project raises on purpose.

One tree under `DuetError`. A message is one line: what, where, expected against found, and what
to do next. The command line prints it as it is and exits with 1, so nothing else may format it.
What is said to refuse a setting raises a `ConfigurationError`, what writes files an `OutputError`.
"""

from collections.abc import Iterable

from duet_unlearn.urls import redact_url


class DuetError(Exception):
    """Something the user can act on; the message says how, without the secrets of a URL."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact_url(message))


class ConfigurationError(DuetError):
    """A setting has a value that cannot work, or two settings contradict each other."""


class MissingSettingError(ConfigurationError):
    """A setting that has no default was not given."""

    def __init__(self, message: str, *, setting: str) -> None:
        super().__init__(message)
        self.setting = setting


class OutputError(DuetError):
    """A result cannot be written: the disk is full, the place is not ours, the folder is closed."""


class DataError(DuetError):
    """A query file, a dataset or a model folder is missing, unreadable or malformed."""


class CacheError(DuetError):
    """A teacher cache cannot be used as asked: unfinished, locked, or no cache at all."""


class CorruptCacheError(CacheError):
    """The bytes of a cache are not what its manifest or the format promises."""


class MismatchError(CacheError):
    """A cache is sound but belongs to something else: another recipe, tokenizer or query set."""


class StoppedError(DuetError):
    """The user stopped the work; what is finished is kept and the message says how to resume."""


class RequirementError(DuetError):
    """A measured number is not what the user required of it."""

    report: object = None
    """The `EvalReport` with the number, where `evaluate` raised it."""


def first_line(error: BaseException) -> str:
    """Return the first line of what somebody else's exception says, else its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some(names: Iterable[str], most: int) -> str:
    """Return the first of the names that differ, and how many more there are."""
    distinct = list(dict.fromkeys(names))
    more = len(distinct) - most
    return ", ".join(distinct[:most]) + (f" and {more} more" if more > 0 else "")
