"""One place where an error becomes the one line that the user reads."""

import contextlib
import errno
import logging
import os
import signal
import sys
from types import FrameType
from typing import IO, Any, NoReturn

import click

from duet_unlearn.data.models.loading import hush_libraries
from duet_unlearn.errors import DuetError, StoppedError
from duet_unlearn.urls import redact_url, visible

EXIT_FAILURE = 1
EXIT_STOPPED = 130


class Failure(click.ClickException):
    """One harmless line on standard error, exit code 1."""

    exit_code = EXIT_FAILURE
    label = "error: "

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        click.echo(f"{self.label}{harmless(self.message)}", err=file is None, file=file)


class _Stopped(Failure):
    """The same for work that the user stopped, exit code 130."""

    exit_code = EXIT_STOPPED
    label = ""


class DuetGroup(click.Group):
    """A click group whose commands end in one line on standard error when they fail.

    Exit codes: 1 for a `DuetError`, 2 for wrong usage (click's own), 130 for Ctrl-C and SIGTERM.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        # Clusters send SIGTERM before they take a machine away: treat it as Ctrl-C. Outside the
        # main thread, as under some test runners, no handler can be set.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except StoppedError as error:
            raise _Stopped(str(error)) from error
        except DuetError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt as error:
            message = "stopped; run the same command again, it resumes from what is finished"
            raise _Stopped(message) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise Failure("out of memory; use a smaller batch or a smaller model") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head` has read enough, which click ends quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise Failure(f"{where}{error.strerror or error}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # whose import takes seconds
        return isinstance(error, MemoryError)
    from duet_unlearn.data.models.loading import is_out_of_memory

    return is_out_of_memory(error)


def harmless(text: str) -> str:
    """Return a message as one line without secrets of URLs and without terminal escapes."""
    return visible(redact_url(" ".join(text.split())))


class _Line(logging.Formatter):
    """One harmless line a record; a traceback, which no user should see, keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 logging's own name
        """Format a record without its traceback."""
        return f"{record.levelname}: {harmless(record.message)}"


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def configure_logging(*, verbose: bool) -> None:
    """Send this project's log to standard error: notes and warnings, all with `--verbose`.

    Of several processes only the first one speaks, the others of errors alone.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    logger = logging.getLogger("duet_unlearn")
    logger.handlers[:] = [handler]
    first = os.environ.get("RANK", "0") == "0"  # torchrun sets it
    spoken = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(spoken if first else logging.ERROR)
    logger.propagate = False
    hush_libraries()
