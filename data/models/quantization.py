"""Weight-only quantization of a model in memory, by torchao.

Rounding can undo what an unlearning changed only a little ("Catastrophic failure of LLM unlearning
via quantization", Zhang et al., arXiv 2410.16454), so what was forgotten is asked for again.

All linear modules but the output head are rounded to the nearest of evenly spaced values around
zero: int8 with one scale an output row, int4 with one scale for a group of 128 neighbouring inputs
(64 or 32 where the width is no multiple of it, else the whole row). Embeddings, norms, the head and
all activations stay as they are.
"""

from typing import TYPE_CHECKING, Any, Literal, get_args

from duet_unlearn.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
_GROUPS = (128, 64, 32)


def quantize_weights(model: "PreTrainedModel", scheme: str) -> int:
    """Quantize a model's linear modules in place; return how many there are.

    Raises:
        ConfigurationError: torchao is not installed or has no such scheme, or the model has no
            linear module, or one that torchao leaves as it is.
    """
    from torch import nn

    anything: Any = model
    head = anything.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    try:
        from torchao.quantization import quantize_
        from torchao.utils import TorchAOBaseTensor

        for width in sorted({module.in_features for module in linear}):
            meant = {id(module) for module in linear if module.in_features == width}
            quantize_(
                model,
                _torchao_config(scheme, width),
                filter_fn=lambda module, _name, meant=meant: id(module) in meant,
            )
    except ImportError as error:
        raise ConfigurationError(
            f"quantize {scheme}: needs torchao, which cannot be imported ({error}); "
            'pip install "duet-unlearn[quantize]"'
        ) from error
    # torchao passes silently over what a scheme does not take.
    if left := [m for m in linear if not isinstance(m.weight, TorchAOBaseTensor)]:
        raise ConfigurationError(
            f"quantize {scheme}: torchao left {len(left)} of {len(linear)} linear modules as they "
            f"are, the first is {left[0]}; leave the scheme out"
        )
    if not linear:
        raise ConfigurationError(
            f"quantize {scheme}: the model has no linear module besides its head; leave it out"
        )
    return len(linear)


def _torchao_config(scheme: str, width: int) -> Any:
    import torch
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )

    if scheme == "int8":
        return Int8WeightOnlyConfig()
    # Int4WeightOnlyConfig needs kernels that a CPU lacks; this one multiplies by the rounded
    # weights in the model's own arithmetic, on any device.
    group = next((size for size in _GROUPS if width % size == 0), None)
    granularity = PerAxis(0) if group is None else PerGroup(group)
    dtypes: Any = torch  # its type stubs lack int4
    return IntxWeightOnlyConfig(weight_dtype=dtypes.int4, granularity=granularity)
