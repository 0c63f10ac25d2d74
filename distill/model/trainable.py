"""What of the student is trained: everything, chosen layers or parameters, or a LoRA adapter.

Whatever is not trained is frozen: the optimizer holds no state for it, and no gradient is computed
that only it would need. Tied weights are one tensor under several names; choosing one name trains
the tensor, and so all of them.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duet_unlearn.data.models.adapters import new_adapter
from duet_unlearn.errors import ConfigurationError, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from duet_unlearn.distill.config import RunConfig

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_SHOWN = 8
_LORA_SETTINGS = (
    "lora_alpha",
    "lora_dropout",
    "lora_extrapolation",
    "lora_target_modules",
    "merge",
)
_LAYERS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What is trained, for people to read."""

    what: str
    parameters: int
    """Numbers that training changes."""
    of: int
    """Numbers of the whole model."""


def check_trained(config: "RunConfig") -> None:
    """Refuse settings that choose what is trained and contradict each other.

    Raises:
        ConfigurationError: Some do.
    """
    if config.layers is not None:
        parse_layers(config.layers)
    if config.parameters is not None:
        try:
            re.compile(config.parameters)
        except re.error as error:
            raise ConfigurationError(
                f"parameters is {config.parameters!r}, expected a regular expression ({error})"
            ) from error
    if config.lora_rank is None:
        for name in _LORA_SETTINGS:
            if not config.is_default(name):
                raise ConfigurationError(
                    f"{name} is {getattr(config, name)!r} without LoRA; give lora_rank as well"
                )
        return
    if not _listed(config.lora_target_modules):
        raise ConfigurationError("lora_target_modules is empty, expected at least one name")
    if config.parameters is not None:
        raise ConfigurationError(
            f"parameters is {config.parameters!r} beside lora_rank: an adapter is chosen by "
            "lora_target_modules and layers; leave one of the two out"
        )
    if config.noise_alpha:
        raise ConfigurationError(
            f"noise_alpha is {config.noise_alpha!r} beside lora_rank: noise changes the weights "
            "that an adapter leaves alone; leave one of the two out"
        )


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the numbers of layers as a user writes them (`5-7`, `0,3,5-7`), sorted, each once.

    Raises:
        ConfigurationError: The text is no list of numbers and ranges.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = _LAYERS.fullmatch(part.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else -1
        if last < first:
            raise ConfigurationError(
                f"layers is {text!r}, expected numbers and ranges such as 0,3,5-7"
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def select_trained(
    model: "PreTrainedModel", config: "RunConfig"
) -> "tuple[PreTrainedModel, Trained]":
    """Freeze what is not trained, or put an adapter in.

    Returns:
        The model to train (with LoRA, peft's around the one given) and what of it is trained.

    Raises:
        ConfigurationError: Nothing of the model is meant, or peft is not installed.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    if config.lora_rank is not None:
        model, what = _with_lora(model, config, config.lora_rank)
    elif config.layers is None and config.parameters is None:
        what = "everything"
    else:
        what = _freeze_others(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("training %s: %d of %d parameters", what, trained, whole)
    return model, Trained(what=what, parameters=trained, of=whole)


def _freeze_others(model: "PreTrainedModel", config: "RunConfig") -> str:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefixes = _layer_prefixes(model, config.layers)
    pattern = re.compile(config.parameters or "")
    chosen = 0
    for parameter in model.parameters():
        own = names[id(parameter)]
        meant = [name for name in own if name.startswith(prefixes) and pattern.search(name)]
        parameter.requires_grad_(bool(meant))
        chosen += bool(meant)
        if meant and len(own) > 1:
            others = [name for name in own if name != meant[0]]
            logger.warning(
                "%s and %s are one tied tensor: it is trained under both names",
                meant[0],
                " and ".join(others),
            )
    if not chosen:
        there = [name for own in names.values() for name in own if name.startswith(prefixes)]
        generic = (re.sub(r"\.\d+\.", ".N.", name) for name in there)
        raise ConfigurationError(
            f"parameters is {config.parameters!r}, which no parameter matches{_within(config)}; "
            f"there are {some(generic, _SHOWN)}"
        )
    parts = [f"layers {config.layers}"] if config.layers is not None else []
    if config.parameters is not None:
        parts.append(f"parameters matching {config.parameters}")
    return ", ".join(parts)


def _within(config: "RunConfig") -> str:
    return "" if config.layers is None else f" in layers {config.layers}"


def _layer_prefixes(model: "PreTrainedModel", layers: str | None) -> tuple[str, ...]:
    """Return what the names of the chosen layers' parameters begin with."""
    from torch import nn

    if layers is None:
        return ("",)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    name = next((name for name, found in lists if len(found) == count), None)
    if name is None or count is None:
        raise ConfigurationError(
            "layers: this model has no list of layers as its config.json counts them; choose by "
            "name with --parameters"
        )
    numbers = parse_layers(layers)
    if numbers[-1] >= count:
        raise ConfigurationError(
            f"layers is {layers!r}, but the student has layers 0-{count - 1}; choose among them"
        )
    return tuple(f"{name}.{number}." for number in numbers)


def _with_lora(
    model: "PreTrainedModel", config: "RunConfig", rank: int
) -> "tuple[PreTrainedModel, str]":
    import torch

    # The adapter starts from a random draw: the seed's, whatever ran before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapted = new_adapter(
            model,
            r=rank,
            lora_alpha=config.lora_alpha or 2 * rank,
            lora_dropout=config.lora_dropout,
            target_modules=_lora_targets(model, config),
        )
    targets = ", ".join(_listed(config.lora_target_modules))
    return adapted, f"LoRA of rank {rank} on {targets}{_within(config)}"


def _listed(targets: Iterable[str]) -> list[str]:
    return [name.strip() for text in targets for name in text.split(",") if name.strip()]


def _lora_targets(model: "PreTrainedModel", config: "RunConfig") -> list[str]:
    """Return the full names of the linear modules that get an adapter.

    Raises:
        ConfigurationError: A target is no linear module of the chosen layers, or is tied.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    prefixes = _layer_prefixes(model, config.layers)
    kinds = (nn.Linear, Conv1D)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    embeddings = model.get_input_embeddings().weight
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names: dict[str, None] = {}
    for target in _listed(config.lora_target_modules):
        found = [
            name
            for name, module in linear.items()
            if f"{name}.".startswith(prefixes)
            and (
                module is not output if target == ALL_LINEAR else f".{name}".endswith(f".{target}")
            )
        ]
        if not found:
            known = some((name.rpartition(".")[2] for name in linear), _SHOWN)
            raise ConfigurationError(
                f"lora_target_modules is {target!r}, which no linear module{_within(config)} is "
                f"called; there are {ALL_LINEAR}, {known}"
            )
        if shared := [name for name in found if linear[name].weight is embeddings]:
            raise ConfigurationError(
                f"lora_target_modules is {target!r}, but {shared[0]} is tied to the embeddings, "
                "which an adapter would part; leave it out, or train it with --parameters"
            )
        names |= dict.fromkeys(found)
    return list(names)
