"""The versions that a result depends on, recorded beside it."""

import importlib.metadata
import platform

from duet_unlearn import __version__

_VERSIONED = ("torch", "transformers", "accelerate", "numpy", "pyarrow", "safetensors")


def versions(*, lora: bool = False, quantized: bool = False) -> dict[str, str]:
    """Return the versions that a run depends on."""
    names = (*_VERSIONED, *(["peft"] if lora else []), *(["torchao"] if quantized else []))
    found = {name: importlib.metadata.version(name) for name in names}
    return {"duet-unlearn": __version__, "python": platform.python_version(), **found}
