"""The one line of a failure and of a log record: no secrets and no terminal escapes in it."""

import logging
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

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
