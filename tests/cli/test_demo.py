"""How the demo ends where one of its commands does not."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from duet_unlearn.cli.distill import main


def test_the_line_of_the_command_that_failed_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code = "from duet_unlearn.cli.distill import main; main()"
    command = [sys.executable, "-c", code, "demo", "--engine", "transformers"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "file")], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    errors = [line for line in result.stderr.splitlines() if not line.startswith("$ ") and line]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path / 'file' / 'cache'}: cannot write")


def test_a_command_that_was_killed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    really_run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _command, **how: really_run(killed, **how))
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 1
    assert "error: the demo stopped: duet-cache build was killed by signal 9" in result.stderr
