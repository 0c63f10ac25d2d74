"""Set up everything in .venv: `make setup`, `make demo` and `make test` come here first.

This entry keeps to the syntax of old interpreters, because its first job is to notice one:
it hands over to the newest suitable Python on the PATH, or says in one line that there is
none. The work itself is in `env_build`.
"""

import argparse
import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
NEWEST = (3, 14)
"""The pinned engine has wheels for these versions and the ones between them."""

CANDIDATES = ("python3", "python3.13", "python3.12", "python3.11", "python3.14")


def fits(version: "tuple[int, ...]") -> bool:
    """Tell whether an interpreter of this version can run the project."""
    return OLDEST <= version <= NEWEST


def version_of(python: str) -> "tuple[int, ...]":
    """Ask an interpreter for its version; an empty tuple where it does not answer."""
    question = "import sys; print('%d %d' % sys.version_info[:2])"
    try:
        # Really run it: version managers leave shims on the PATH for versions not in use.
        answer = subprocess.run(
            [python, "-c", question],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(part) for part in answer.stdout.split())


def find_python() -> str:
    """Return the first suitable interpreter on the PATH, or an empty string."""
    for name in CANDIDATES:
        path = shutil.which(name)
        if path and fits(version_of(path)):
            return path
    return ""


def main() -> int:
    """Parse the command line, settle the interpreter, and build the environment."""
    parser = argparse.ArgumentParser(description="Set up duet-unlearn in .venv.")
    parser.add_argument("--machine", choices=("cpu", "nvidia", "plain"), help="skip the detection")
    parser.add_argument(
        "--python-chosen", action="store_true", help="this interpreter and no other is wanted"
    )
    arguments = parser.parse_args()
    if not fits(sys.version_info[:2]):
        other = "" if arguments.python_chosen else find_python()
        if other:
            os.execv(other, [other, __file__, *sys.argv[1:]])  # noqa: S606
        needed = "Python {}.{} to {}.{} is needed".format(*OLDEST, *NEWEST)
        found = "{} is {}.{}".format(sys.executable, *sys.version_info[:2])
        advice = "install one, or name one with make PYTHON=/path/to/python"
        print(f"error: {needed}, {found}: {advice}", file=sys.stderr)
        return 1
    from env_build import set_up  # only now: it is written for the Python just made sure of

    return set_up(machine=arguments.machine, python_chosen=arguments.python_chosen)


if __name__ == "__main__":
    raise SystemExit(main())
