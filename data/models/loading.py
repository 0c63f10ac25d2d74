"""One way to load a causal language model: to answer with it, or to train it."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duet_unlearn.data.models.adapters import add_adapter
from duet_unlearn.data.models.folder import read_config, stored_dtype
from duet_unlearn.errors import ConfigurationError, DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What to compute in; `auto` is what `fastest_dtype` says."""

_CANNOT_LOAD = (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that CPU or GPU memory ran out."""
    import torch

    # Only the GPU's allocator has an error type of its own; the driver and cuBLAS have none.
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def too_large(model: Path, dtype: str) -> ConfigurationError:
    """Return the error for a model that the memory does not hold."""
    return ConfigurationError(
        f"model {model}: does not fit into memory as {dtype}; free some of it, use a larger device "
        "or load it as bfloat16 (--dtype, of a teacher --teacher-dtype)"
    )


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    adapter: Path | None = None,
    trainable: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a model and, where one is given, a LoRA adapter on top of it.

    For answering the model goes to `device` or the GPUs that there are, in evaluation mode, with
    the adapter merged into its weights in memory. For training it stays in main memory, as its
    trainer moves it, and the adapter stays apart. Code that comes with the folder runs only where
    `trust_remote_code` says so.

    Raises:
        ConfigurationError: the memory does not hold the model, or peft is not installed.
        DataError: transformers cannot load the folder, weights of the model are missing in it, or
            the adapter does not fit.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    places: str | dict[str, str] | None = None if device in (None, "cpu") else {"": str(device)}
    if device is None and torch.cuda.is_available() and not trainable:
        places = "auto"
    if dtype == "auto":
        dtype = fastest_dtype(folder)
    try:
        with no_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map=places,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,  # a pickle beside them is never read
                output_loading_info=True,
            )
    except (*_CANNOT_LOAD, MemoryError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise too_large(folder, dtype) from error
        reason = first_line(error)
        raise DataError(
            f"model {folder}: transformers cannot load it ({reason}); "
            "expected a causal language model it knows"
        ) from error
    model, info = loaded
    # transformers fills what is missing with random numbers: the answers would be noise, and a
    # loss would still go down.
    if info["missing_keys"]:
        raise DataError(
            f"model {folder}: {len(info['missing_keys'])} weights are missing in its files, the "
            f"first is {min(info['missing_keys'])}; copy or save the model again"
        )
    if adapter is not None:
        model = add_adapter(model, adapter)
    if not trainable:
        model = (model.merge_and_unload() if adapter is not None else model).eval()
    return model  # type: ignore[no-any-return]


def fastest_dtype(folder: Path) -> str:
    """Return the dtype in which this machine computes fastest without losing what is stored.

    That is the stored one on a GPU; on a CPU it is bfloat16 where the model is stored so and the
    processor multiplies it in hardware, else float32.
    """
    stored = stored_dtype(read_config(folder))
    if stored == "float32":
        return stored
    import torch

    if torch.cuda.is_available():
        return stored
    return "bfloat16" if stored == "bfloat16" and _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    import torch

    # PyTorch's own names for these are private, and older versions lack some.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)


def hush_libraries() -> None:
    """Keep torchao from telling of every kernel that this machine cannot load.

    transformers imports it where it is installed.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' own bars off: they would break the caller's, and fill log files."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
