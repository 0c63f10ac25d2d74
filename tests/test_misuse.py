"""What a tired user does ends in one line; `make misuse` tries all of it, this a few of each kind.

`DUET_MISUSE_SAMPLE` sets how many, `DUET_MISUSE_SEED` which.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_a_sample_of_wrong_uses_ends_in_one_line_and_touches_nothing() -> None:
    sample, seed = (
        os.environ.get(f"DUET_MISUSE_{n}", d) for n, d in (("SAMPLE", "38"), ("SEED", "0"))
    )
    command = [sys.executable, str(Path(__file__).with_name("misuse")), "--jobs", "1"]
    result = subprocess.run(
        [*command, "--sample", sample, "--seed", seed], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].endswith(", 0 failed")
