"""Build .venv: a stamp says whether anything is to do, pip does it, a check proves it.

Set-up may be stopped anywhere. The stamp is marked unfinished before the first change and
finished after the last check, and every step may be repeated, so the next run completes it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from env_plan import COMPANIONS, DISK_GB, Machine, Step, explain_failure, plan
from env_stamp import read_stamp, running_python, same_base, wanted_stamp, write_stamp

ROOT = Path(__file__).resolve().parent.parent
GIGABYTE = 1_000_000_000


class SetupError(Exception):
    """Something is missing; the message says what, in one line, and what to do."""


def set_up(*, machine: str | None, python_chosen: bool) -> int:
    """Bring .venv up to date and return the exit status.

    Args:
        machine: the kind of machine the user named, or None to find out.
        python_chosen: whether the user named this interpreter.
    """
    try:
        with _only_one(ROOT):
            build(ROOT, machine=machine, python_chosen=python_chosen)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def build(root: Path, *, machine: str | None, python_chosen: bool) -> None:
    """Do what is left to do for the environment of the project at `root`.

    Raises:
        SetupError: something is missing on this machine.
    """
    venv = root / ".venv"
    old = read_stamp(venv)
    wanted = wanted_stamp(root, old, machine=machine, python_chosen=python_chosen)
    if old == wanted and venv_python(venv).exists():
        return
    started = time.monotonic()
    kind = Machine(wanted.machine)
    usable = _is_usable(venv)
    rebuilt = usable and old is not None and not same_base(old, wanted)
    _check_disk(root, 0 if rebuilt or not usable else _bytes_below(venv), kind)
    _say(f"Setting up {venv} for machine '{kind}' (Python {wanted.python})")
    if rebuilt or not usable:
        _create_venv(venv)
        wanted = replace(wanted, python=running_python())
    write_stamp(venv, wanted, finished=False)
    remove_half_installed(venv)
    _install(root, plan(kind, platform.system()))
    if kind is not Machine.NVIDIA:
        _remove_broken_companions(venv)
    _check(root, kind)
    write_stamp(venv, wanted, finished=True)
    _say(f"Set up in {time.monotonic() - started:.0f} s")


def venv_python(venv: Path) -> Path:
    """Return the path of an environment's interpreter."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def remove_half_installed(venv: Path) -> None:
    """Remove the traces that make pip take a package for installed that it was stopped in.

    pip writes a package's RECORD last; METADATA alone already counts as installed.
    """
    for site in venv.glob("lib/python*/site-packages"):
        for info in site.glob("*.dist-info"):
            if not (info / "RECORD").exists():
                shutil.rmtree(info)
        # pip sets a package aside under such a name while it replaces it.
        for aside in site.glob("~*"):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _check_disk(root: Path, used: int, machine: Machine) -> None:
    """Raise unless there is room for what is still to be installed."""
    needed = max(DISK_GB[machine] * GIGABYTE - used, GIGABYTE)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise SetupError(
            f"not enough disk in {root}: set-up needs {needed / GIGABYTE:.1f} GB, "
            f"{free / GIGABYTE:.1f} GB are free: free some space and run it again"
        )


def _bytes_below(folder: Path) -> int:
    """Return the size of the files in a folder, in bytes."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size  # noqa: PTH118 - 60,000 files
    return total


def _is_usable(venv: Path) -> bool:
    """Tell whether an environment's own pip answers (not so if its making was stopped)."""
    try:
        command = [str(venv_python(venv)), "-m", "pip", "--version"]
        subprocess.run(command, capture_output=True, check=True, env=_environment(venv))
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _create_venv(venv: Path) -> None:
    """Create an empty environment, in place of what may be there."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} lacks the venv module: install it (Debian and Ubuntu: "
            f"apt install python{running_python()}-venv), or name another with make PYTHON=..."
        )
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, env=_environment(venv))
    if made.returncode:
        lines = [line for line in (made.stderr or made.stdout).splitlines() if line.strip()]
        raise SetupError(f"{sys.executable} cannot create {venv}: {lines[-1] if lines else ''}")


def _install(root: Path, steps: tuple[Step, ...]) -> None:
    """Run the steps' pip commands, each step until one of its attempts succeeds."""
    venv = root / ".venv"
    log = venv / "setup.log"
    log.write_text("", encoding="utf-8")
    pip = [str(venv_python(venv)), "-m", "pip", "install", "--progress-bar", "off"]
    # A small /tmp cannot hold these downloads; .venv's disk has just been checked.
    temporary = venv / "setup-tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    environment = _environment(venv) | {"TMPDIR": str(temporary)}
    for number, step in enumerate(steps, start=1):
        _say(f"[{number}/{len(steps)}] {step.title}")
        begin = log.stat().st_size
        if not any(_run_logged([*pip, *a], root, environment, log) for a in step.attempts):
            printed = log.read_bytes()[begin:].decode(errors="replace")
            raise SetupError(explain_failure(printed))
    shutil.rmtree(temporary, ignore_errors=True)


def _run_logged(command: list[str], root: Path, environment: dict[str, str], log: Path) -> bool:
    """Run a command with its output in the log, and a line of progress on a terminal."""
    started = time.monotonic()
    live = sys.stderr.isatty()
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        print("$", *command, file=file)
        for line in process.stdout or ():
            file.write(line)
            if live:
                seconds = time.monotonic() - started
                print(f"\r\x1b[K  {seconds:4.0f} s  {line.strip()[:60]}", end="", file=sys.stderr)
    if live:
        print("\r\x1b[K", end="", file=sys.stderr)
    return process.returncode == 0


def _remove_broken_companions(venv: Path) -> None:
    """Uninstall torchvision and the like where they do not import against the CPU torch."""
    for name in COMPANIONS:
        present = any(venv.glob(f"lib/python*/site-packages/{name}"))
        if present and _run_python(venv, ["-c", f"import {name}"]).returncode:
            _say(f"{name} does not import beside this torch: removed")
            _run_python(venv, ["-m", "pip", "uninstall", "--yes", "--quiet", name])


def _check(root: Path, machine: Machine) -> None:
    """Raise unless torch, transformers, the project and vLLM import together."""
    _say("checking that it imports")
    venv = root / ".venv"
    checked = _run_python(venv, [str(root / "tools" / "env_check.py"), machine.value])
    with (venv / "setup.log").open("a", encoding="utf-8") as file:
        file.write(checked.stdout + checked.stderr)
    if checked.returncode:
        lines = checked.stdout.splitlines() or checked.stderr.splitlines() or ["no output"]
        raise SetupError(f"{lines[-1]} (details: .venv/setup.log)")


def _run_python(venv: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the environment's interpreter and return what it printed."""
    command = [str(venv_python(venv)), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=_environment(venv)
    )


def _environment(venv: Path) -> dict[str, str]:
    """Return the process environment without what would lead pip out of .venv."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {
        "VIRTUAL_ENV": str(venv),
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_RETRIES": "2",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Make a second set-up of the same checkout wait for the first."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where it goes unguarded
        yield
        return
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another set-up is at work here: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
