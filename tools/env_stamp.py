"""What .venv was set up for, and what it should be set up for now.

Comparing the two is all that `make demo` and `make test` do when nothing has changed, so
nothing here starts a process unless the machine looks different from the last time.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from env_plan import machine_kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """What .venv was set up for."""

    inputs: str
    """Hash of everything the installation follows from."""

    machine: str
    hints: str
    """What could be seen of an NVIDIA GPU without asking it."""

    python: str
    finished: bool


def read_stamp(venv: Path) -> Stamp | None:
    """Return the stamp of an environment, or None where there is none that can be read."""
    try:
        return Stamp(**json.loads((venv / "setup-stamp.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(venv: Path, stamp: Stamp, *, finished: bool) -> None:
    """Replace an environment's stamp in one step."""
    text = json.dumps({**asdict(stamp), "finished": finished}, indent=1)
    temporary = venv / "setup-stamp.json.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(venv / "setup-stamp.json")


def hash_inputs(root: Path) -> str:
    """Hash what the installation follows from; a linter's settings, say, are not part of it."""
    with (root / "pyproject.toml").open("rb") as file:
        metadata = tomllib.load(file)
    digest = hashlib.sha256()
    parts = {key: metadata.get(key) for key in ("build-system", "project")}
    digest.update(json.dumps(parts, sort_keys=True).encode())
    files = [root / "setup.cfg", *root.glob("constraints/*.txt"), *root.glob("tools/*env*.py")]
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def wanted_stamp(
    root: Path, old: Stamp | None, *, machine: str | None, python_chosen: bool
) -> Stamp:
    """Return the stamp that a finished set-up leaves now."""
    hints = _nvidia_hints()
    # A choice made once, of the machine or of Python, holds until another one is made.
    if machine is None and old is not None and old.hints == hints:
        machine = old.machine
    if machine is None:
        kind = machine_kind(platform.system(), platform.machine(), has_nvidia=_has_nvidia())
        machine = kind.value
    return Stamp(
        inputs=hash_inputs(root),
        machine=machine,
        hints=hints,
        python=running_python() if old is None or python_chosen else old.python,
        finished=True,
    )


def running_python() -> str:
    """Return the version of this interpreter as an environment's stamp names it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def same_base(old: Stamp, wanted: Stamp) -> bool:
    """Tell whether an environment can be brought from one stamp to the other by pip."""
    return (old.machine, old.python) == (wanted.machine, wanted.python)


def _nvidia_hints() -> str:
    """Describe the cheap signs of an NVIDIA GPU: asking it takes a second, these take none."""
    node = bool(list(Path("/dev").glob("nvidia[0-9]*")))
    return f"node={node} nvidia-smi={shutil.which('nvidia-smi') is not None}"


def _has_nvidia() -> bool:
    """Tell whether an NVIDIA GPU answers."""
    # The driver's file alone is not enough: a container without a GPU sees its host's.
    if Path("/proc/driver/nvidia/version").exists() and list(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return "GPU " in answer.stdout
