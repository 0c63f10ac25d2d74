"""The one line of a failure and of a log record: no secrets and no terminal escapes in it."""

import errno
import logging
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from duet_unlearn.cli.cache import main as duet_cache
from duet_unlearn.cli.distill import main as duet_distill
from duet_unlearn.cli.errors import DuetGroup, configure_logging
from duet_unlearn.errors import CacheError, StoppedError

FOREIGN = (
    "https://me:s3cr3t@host/a?sig=s3cr3t: it says \x1b[2J\x1b]0;owned\x07\r\nERROR: \u202eall well"
)
SHOWN = "https://host/a?...: it says \\x1b[2J\\x1b]0;owned\\x07 ERROR: \\u202eall well"


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("duet_unlearn")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.parametrize(
    ("error", "code", "label"), [(CacheError, 1, "error: "), (StoppedError, 130, "")]
)
def test_a_failure_is_one_harmless_line(error: type[Exception], code: int, label: str) -> None:
    @click.group(cls=DuetGroup)
    def main() -> None: ...

    @main.command()
    def fail() -> None:
        raise error(FOREIGN)

    result = CliRunner().invoke(main, ["fail"])
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"{label}{SHOWN}\n"


def test_so_is_a_log_record(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(verbose=False)
    logging.getLogger("duet_unlearn.anywhere").warning("%s", FOREIGN)
    assert capsys.readouterr().err == f"WARNING: {SHOWN}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a\x1b[2J"), "a\\x1b[2J: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "page.html"), "page.html: Permission"),
        (MemoryError(), "out of memory; use a smaller batch"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory; use a smaller batch"),
        (RuntimeError("CUDA error: out of memory\nSet X"), "out of memory; use a smaller batch"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: Exception, line: str) -> None:
    @click.group(cls=DuetGroup)
    def main() -> None: ...

    @main.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(main, ["fail"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1


def test_a_failure_with_an_exit_code_of_its_own_is_harmless_too(tmp_path: Path) -> None:
    foreign = str(tmp_path / "a\x1b]0;owned\x07")
    result = CliRunner().invoke(duet_cache, ["diff", foreign, foreign])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "\x1b" not in result.stderr
    assert "\\x1b]0;owned\\x07" in result.stderr


def test_json_means_the_same_in_every_command() -> None:
    commands = {**duet_cache.commands, **duet_distill.commands}
    flags = {
        name: option.help
        for name, command in commands.items()
        for option in command.params
        if isinstance(option, click.Option) and "--json" in option.opts
    }
    # `prefixes` prints a list for people, `demo` runs the other commands.
    assert commands.keys() - flags.keys() == {"prefixes", "demo"}
    assert set(flags.values()) == {
        "Print one JSON document on standard output, in place of the text."
    }
