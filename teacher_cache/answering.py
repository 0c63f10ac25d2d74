"""An engine of a build as what answers in an evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from duet_unlearn.data.models.loading import fastest_dtype
from duet_unlearn.evaluation.config import EvalConfig
from duet_unlearn.evaluation.evaluate import Respond
from duet_unlearn.teacher_cache.engines import open_engine, resolve_engine_name
from duet_unlearn.teacher_cache.engines.base import EngineConfig


def vllm_answers(config: EvalConfig) -> Respond:
    """Return what lets vLLM answer in `evaluate`, one engine a model.

    Raises:
        ConfigurationError: vLLM is not installed; this is named before any query is read.
    """
    resolve_engine_name("vllm")

    def respond(
        folder: Path, prompts: Sequence[tuple[int, ...]], ends: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        engine_config = EngineConfig(
            model=folder,
            top_k=1,
            positions=1,
            eos_token_ids=tuple(ends),
            compute_dtype=fastest_dtype(folder) if config.dtype == "auto" else config.dtype,
            max_prompt_tokens=max(map(len, prompts)),
            max_new_tokens=config.max_new_tokens,
        )
        with closing(open_engine("vllm", engine_config)) as engine:
            yield from engine.responses(enumerate(prompts), config.max_new_tokens)

    return respond
