"""Check, inside the environment, that what was installed works together.

Run by the environment's own interpreter: `python tools/env_check.py cpu|nvidia|plain`.
Prints one line and exits with 1 when something does not.
"""

from __future__ import annotations

import importlib
import sys


def torch_fault(machine: str, cuda: str | None, *, gpu_answers: bool) -> str | None:
    """Say what is wrong with a torch build on a machine, or return None.

    Args:
        machine: the kind of machine.
        cuda: the CUDA version torch was built for, None for a CPU build.
        gpu_answers: whether torch finds a GPU it can use.
    """
    if machine == "cpu" and cuda is not None:
        return f"torch is the build for CUDA {cuda}, expected the CPU build: run make clean-all"
    if machine == "nvidia" and cuda is None:
        return "torch is the CPU build, expected a CUDA build: run make clean-all"
    if machine == "nvidia" and not gpu_answers:
        return (
            f"torch finds no GPU it can use with CUDA {cuda}: update the NVIDIA driver, "
            "or run make setup MACHINE=cpu"
        )
    return None


def import_fault(module: str, attribute: str) -> str | None:
    """Really import something, and return the one line that says why it does not work."""
    try:
        getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a broken build raises is the answer
        reason = " ".join(str(error).split())
        return f"{module}.{attribute} does not import: {reason}"
    return None


def fault(machine: str) -> str | None:
    """Return the first fault of this environment in one line, or None."""
    import torch

    gpu_answers = machine == "nvidia" and torch.cuda.is_available()
    found = torch_fault(machine, torch.version.cuda, gpu_answers=gpu_answers)
    # transformers imports lazily: only a model class pulls in torchvision and the like.
    found = found or import_fault("transformers", "LlamaForCausalLM")
    found = found or import_fault("duet_unlearn.teacher_cache", "__name__")
    if found or machine == "plain":
        return found
    found = import_fault("vllm", "LLM")
    return f"{found} (make setup MACHINE=plain does without it)" if found else None


if __name__ == "__main__":
    if message := fault(sys.argv[1]):
        print(message)
        raise SystemExit(1)
