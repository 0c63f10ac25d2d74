"""Engines that run the prefixed teacher and return its signals."""

import logging
from importlib.util import find_spec
from typing import get_args

from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig
from duet_unlearn.teacher_cache.engines.options import EngineName

logger = logging.getLogger(__name__)


def resolve_engine_name(name: str) -> str:
    """Return `vllm` or `transformers`: for `auto`, vLLM where it is installed. Imports neither.

    Raises:
        ConfigurationError: There is no such engine, or vLLM is asked for and not installed.
    """
    if name not in (known := get_args(EngineName)):
        raise ConfigurationError(f"engine {name!r}: expected one of {', '.join(known)}")
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        from duet_unlearn.teacher_cache.engines.vllm import MISSING

        raise ConfigurationError(MISSING)
    if name == "auto":
        return "vllm" if installed else "transformers"
    return name


def open_engine(name: str, config: EngineConfig) -> Engine:
    """Start an engine: `auto`, `vllm` or `transformers`.

    `auto` falls back to transformers where vLLM is installed but cannot be imported.

    Raises:
        ConfigurationError: There is no such engine or it is not installed, or a setting does not
            fit the model.
        DuetError: The engine does not start; the message gives the cause.
    """
    resolved = resolve_engine_name(name)
    if resolved == "vllm":
        from duet_unlearn.teacher_cache.engines.vllm import VllmEngine, VllmImportError

        try:
            return VllmEngine(config)
        except VllmImportError as error:
            if name != "auto":
                raise
            logger.warning("%s; taking transformers instead", error)
    from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine

    return TransformersEngine(config)
