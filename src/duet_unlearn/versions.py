"""The versions that a result depends on, recorded beside it."""

import importlib.metadata
import platform

from duet_unlearn import __version__

_VERSIONED = ("torch", "transformers", "accelerate", "numpy", "pyarrow", "safetensors")


def versions(
    *, lora: bool = False, quantized: bool = False, harness: bool = False
) -> dict[str, str]:
    """Return the versions that a run depends on."""
    extras = {"peft": lora, "torchao": quantized, "lm-eval": harness}
    names = (*_VERSIONED, *(name for name, used in extras.items() if used))
    found = {name: importlib.metadata.version(name) for name in names}
    return {"duet-unlearn": __version__, "python": platform.python_version(), **found}
