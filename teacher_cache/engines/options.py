"""What a user says of an engine: its settings, and options of its own that pass through to it.

An engine's options may decide how fast it runs and on what. They are no part of the recipe, so
whatever decides a signal, or whether it can be captured, is not theirs to set.
"""

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from duet_unlearn.data.models.folder import read_config, stored_dtype
from duet_unlearn.data.models.loading import Dtype, fastest_dtype
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.settings import setting

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "vllm", "transformers"]
# Settings of every command that runs a teacher, each where its help page has them.
_ENGINE = "What runs the teacher; auto takes vLLM where it imports."
_DTYPE = (
    "What the teacher computes in; auto is what its config.json names, but float32 on a processor "
    "without arithmetic in that. Part of the recipe."
)
ENGINE = partial(setting, default="auto", group="Engine", help=_ENGINE)
ENGINE_ARGS = partial(
    setting,
    default_factory=dict,
    flag="--engine-arg",
    metavar="KEY=VALUE",
    help="An option for the engine, by its own name: tensor_parallel_size=2. Repeatable.",
)
TEACHER_DTYPE = partial(setting, default="auto", help=_DTYPE)
TRUST_REMOTE_CODE = partial(setting, default=False, help="Run code that comes with the model.")

# fmt: off
VLLM_RESERVED = frozenset({
    "aux_output_config", "code_revision", "config_format", "convert", "default_mm_loras",
    "disable_log_stats", "dtype", "enable_lora", "enable_prompt_embeds", "generation_config",
    "hf_config_path", "hf_overrides", "hf_token", "kv_cache_dtype", "load_format",
    "logits_processors", "logprobs_mode", "max_logprobs", "model", "model_class_overrides",
    "model_weights", "override_generation_config", "pooler_config", "quantization",
    "quantization_config", "revision", "runner", "seed", "served_model_name", "skip_tokenizer_init",
    "spec_method", "spec_model", "spec_tokens", "speculative_config", "tokenizer", "tokenizer_mode",
    "tokenizer_revision", "trust_remote_code", "watermark", "watermark_config", "worker_cls",
    "worker_extension_cls",
})
# fmt: on
"""Options of vLLM that decide what a signal is, or whether it can be captured."""
TRANSFORMERS_OPTIONS = {
    "batch_rows": "most prompts in a batch, a number from 1",
    "device": "such as cpu, cuda or cuda:1",
}
"""Options of the transformers engine; it has no others."""

_PRIVATE_NAME = re.compile(
    "token(?!s)|secret|password|api_?key|credential|addr|host", re.IGNORECASE
)
_PLAIN_WORD = re.compile(r"[A-Za-z](?:[A-Za-z0-9_+-]|\.(?=\d)){0,23}(:\d{1,3})?")


def check_options(engine: str, options: Mapping[str, Any]) -> None:
    """Check options before the engine is started; what only vLLM knows, it checks at its start.

    Raises:
        ConfigurationError: An option is not the user's to set, unknown, or has an unusable value.
    """
    if engine == "vllm":
        if reserved := sorted(VLLM_RESERVED & set(options)):
            raise ConfigurationError(
                f"vllm engine: option {reserved[0]} is set by the cache itself, because it decides "
                "what a signal is or how it is captured; leave it out"
            )
        return
    for name, value in options.items():
        if name not in TRANSFORMERS_OPTIONS:
            known = "; ".join(f"{key}, {what}" for key, what in TRANSFORMERS_OPTIONS.items())
            raise ConfigurationError(
                f"transformers engine: has no option {name}, expected {known}; leave it out, or "
                "use --engine vllm for its options"
            )
        whole = type(value) is int and value >= 1
        if not (whole if name == "batch_rows" else isinstance(value, str)):
            raise ConfigurationError(
                f"transformers engine: option {name} is {value!r}, expected "
                f"{TRANSFORMERS_OPTIONS[name]}"
            )


def compute_dtype(asked: Dtype, folder: Path, *, elsewhere: bool = False) -> str:
    """Return what a teacher computes in, with `auto` replaced.

    Args:
        asked: The setting.
        folder: Of the teacher.
        elsewhere: It runs on other machines than this one, whose processors say nothing then.
    """
    if asked != "auto":
        return asked
    stored = stored_dtype(read_config(folder))
    fastest = stored if elsewhere else fastest_dtype(folder)
    if fastest != stored:
        logger.info(
            "teacher_dtype auto: %s, since this processor has no arithmetic in %s, as the model is "
            "stored; --teacher-dtype %s computes in that, several times as long",
            fastest,
            stored,
            stored,
        )
    return fastest


def published_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as a cache may show them to others.

    Numbers, booleans and plain words (`fp8`, `auto`) stay as they are. Whatever else a value may
    be, such as a path, an address or a secret, is left out: the option's name alone is recorded.
    """
    return {
        name: value if _may_show(name, value) else "(not published)"
        for name, value in options.items()
    }


def _may_show(name: str, value: Any) -> bool:
    if _PRIVATE_NAME.search(name):
        return False
    if isinstance(value, str):
        return _PLAIN_WORD.fullmatch(value) is not None
    return value is None or isinstance(value, bool | int | float)


def gpus_of_engine(engine: str, options: Mapping[str, Any]) -> int:
    """Return how many GPUs one engine takes where there are some.

    Raises:
        ConfigurationError: A size of vLLM's parallelism is not a number from 1.
    """
    gpus = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size") if engine == "vllm" else ():
        size = options.get(name, 1)
        if type(size) is not int or size < 1:
            raise ConfigurationError(
                f"vllm engine: option {name} is {size!r}, expected a number from 1"
            )
        gpus *= size
    return gpus
