"""Mutated caches are refused or read, and nothing else; `make fuzz` runs many more of them.

`DUET_FUZZ_INPUTS` sets how many run here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

INPUTS = int(os.environ.get("DUET_FUZZ_INPUTS", "300"))
FUZZ = Path(__file__).parents[1] / "fuzz"


def test_mutated_caches_give_our_own_errors_only() -> None:
    result = subprocess.run(
        [sys.executable, str(FUZZ), "--inputs", str(INPUTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}{result.stderr[-3000:]}"
    totals = json.loads(result.stdout)
    assert totals["refused"] + totals["accepted"] == totals["inputs"] == INPUTS
    # Mutations that all bounce off the first check would test nothing.
    assert totals["refused"] > INPUTS // 2
    assert totals["accepted"] > INPUTS // 50
