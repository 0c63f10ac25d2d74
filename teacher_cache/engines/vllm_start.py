"""Start vLLM's engine: in vLLM's own process, never in the user's."""

import contextlib
import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from duet_unlearn.teacher_cache.engines.base import cause
from duet_unlearn.teacher_cache.engines.options import published_options

_CAPTURE = "duet_unlearn.teacher_cache.engines.vllm_capture"
_CPU_BLOCK = 32
"""Tokens in a KV block on a CPU: vLLM's default of 128 never reuses a short steering prefix."""


class UnusableOptionError(Exception):
    """vLLM has no such option, or not with that value; the message says which."""


def start_engine(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the running `LLMEngine` and the configuration it resolved.

    Raises:
        UnusableOptionError: This vLLM has no option of that name, or does not take its value.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    _check_names(config["engine_args"], [field.name for field in dataclasses.fields(EngineArgs)])
    on_cpu = current_platform.is_cpu()
    options: dict[str, Any] = {
        "model": config["model"],
        "dtype": config["compute_dtype"],
        "max_model_len": config["max_model_len"],
        "trust_remote_code": config["trust_remote_code"],
        "seed": 0,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # the folder's may bring penalties
        "logprobs_mode": "raw_logits",
        "logits_processors": [f"{_CAPTURE}:CaptureProcessor"],
        "worker_extension_cls": f"{_CAPTURE}.CaptureExtension",
        "disable_log_stats": True,
    }
    if on_cpu:
        # Compiling takes the CPU backend 40 s and wins nothing measurable on short prompts.
        options |= {"block_size": _CPU_BLOCK, "enforce_eager": True}
        _load_model_class(Path(config["model"]))
    options |= config["engine_args"]
    try:
        vllm_config = EngineArgs(**options).create_engine_config()
    except Exception as error:
        if not config["engine_args"]:
            raise
        given = ", ".join(f"{name}={value}" for name, value in config["engine_args"].items())
        raise UnusableOptionError(f"vLLM does not take {given}: {cause(error)}") from error
    if on_cpu and vllm_config.cache_config.kv_cache_memory_bytes is None:
        vllm_config.cache_config.kv_cache_memory_bytes = _cpu_kv_bytes(vllm_config)
    return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True), vllm_config


def _check_names(options: dict[str, Any], known: list[str]) -> None:
    import vllm

    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]}?" if close else "see vLLM's engine arguments"
            raise UnusableOptionError(f"vLLM {vllm.__version__} has no option {name}; {advice}")


def _load_model_class(folder: Path) -> None:
    """Import the model's class here and now.

    vLLM looks at a class for the first time in a process of its own, so that CUDA stays
    untouched. On a CPU that only costs another import of vLLM.
    """
    from vllm import ModelRegistry

    # Only a short cut: where it fails, vLLM goes its own way and says what is wrong.
    with contextlib.suppress(Exception):
        for name in json.loads((folder / "config.json").read_text())["architectures"]:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _cpu_kv_bytes(vllm_config: Any) -> int:
    """Return room for every running sequence at full length, within a quarter of free memory.

    vLLM would take most of the machine's memory, which a CPU shares with everything else.
    """
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    token = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
        * model.dtype.itemsize
    )
    block = vllm_config.cache_config.block_size
    blocks = -(-model.max_model_len // block) * vllm_config.scheduler_config.max_num_seqs + 16
    free = get_memory_node_info(get_visible_memory_node()[0]).available_memory
    return int(max(64 * 2**20, min(blocks * block * token, free // 4)))


def describe(vllm_config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return what may move the last bits of a logit, and the options that the user gave."""
    import torch
    import transformers
    import vllm
    from vllm.platforms import current_platform

    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    on_cpu = current_platform.is_cpu()
    return {
        "engine": "vllm",
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": "cpu" if on_cpu else current_platform.get_device_name(),
        "settings": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "block_size": cache.block_size,
            "prefix_caching": bool(cache.enable_prefix_caching),
            "max_model_len": model.max_model_len,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "enforce_eager": bool(model.enforce_eager),
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            **({"threads": torch.get_num_threads()} if on_cpu else {}),
        },
        **({"options": published_options(options)} if options else {}),
    }
