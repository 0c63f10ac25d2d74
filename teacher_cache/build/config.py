"""What a build is asked to do, and the recipe that follows from it and the model folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.fingerprint import (
    chat_template_fingerprint,
    config_fingerprint,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
    weights_fingerprint,
)
from duet_unlearn.data.models.folder import eos_token_ids, head_width, read_config, stored_dtype
from duet_unlearn.data.prompts import TEMPLATE_DATE
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.build.plan import Part, check_shard_rows
from duet_unlearn.teacher_cache.engines import resolve_engine_name
from duet_unlearn.teacher_cache.engines.options import check_options
from duet_unlearn.teacher_cache.format.recipe import COMPUTE_DTYPES, Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What `duet-cache build` was asked to do."""

    teacher: str
    """Model folder or hub id of the base model."""
    out: Path
    """The cache folder."""
    forget: tuple[str, ...] = ()
    """Sources of forget queries."""
    retain: tuple[str, ...] = ()
    """Sources of retain queries."""
    prefix: str
    """The steering prefix in full."""
    prefix_place: str = "system"
    """`system`, `user` or `raw`."""
    retain_prefix: bool = True
    """Put the prefix in front of retain queries too (the paper's Eq. 3)."""
    views: tuple[str, ...] = ()
    """Shapes in which the plain base answers the retain queries too, for training in them."""
    top_k: int = 100
    """Tokens kept at each position."""
    positions: int = 1
    """Most positions a query."""
    engine: str = "auto"
    """`vllm`, `transformers`, or `auto`: vLLM where it imports."""
    shard_rows: int = 1024
    """Queries a shard."""
    logit_dtype: str = "float16"
    """How logits are stored."""
    teacher_dtype: str = "auto"
    """What the teacher computes in; `auto` is the dtype its configuration names."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    reuse: tuple[str, ...] = ()
    """Caches of the same recipe whose rows are taken over; they do not change what is built."""

    check: bool = True
    """Measure how well the prefix steers on a sample first, and record that in the manifest."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Options for the engine, by its own names; recorded with the rows, no part of the recipe."""
    part: Part | None = None
    """Build this part of the queries alone, for `merge` to join with the others."""
    workers: int | None = None
    """Engines that run at the same time on a Ray cluster; None for one engine without Ray."""
    ray_address: str = "local"
    """The Ray cluster's address; `local` starts one on this machine."""

    def __post_init__(self) -> None:
        """Check what needs no model.

        Raises:
            ConfigurationError: A value cannot work.
        """
        if not self.prefix.strip():
            raise ConfigurationError(
                "the steering prefix is empty; give --prefix a text or the @NAME of a built-in one"
            )
        if not self.forget and not self.retain:
            raise ConfigurationError("no queries; give --forget FILE, and --retain FILE beside it")
        if self.teacher_dtype not in ("auto", *COMPUTE_DTYPES):
            raise ConfigurationError(
                f"teacher_dtype is {self.teacher_dtype!r}, expected auto or one of "
                f"{', '.join(COMPUTE_DTYPES)}"
            )
        check_shard_rows(self.shard_rows, max(self.top_k, 1), max(self.positions, 1))
        if self.workers is not None and self.workers < 1:
            raise ConfigurationError(f"workers is {self.workers}, expected a number from 1")
        if self.engine_args:
            check_options(resolve_engine_name(self.engine), self.engine_args)


def make_recipe(config: BuildConfig, folder: Path) -> Recipe:
    """Return the recipe of a build; reads and hashes the model folder, loads nothing.

    Raises:
        ConfigurationError: A setting is out of range for this model.
        DataError: The model folder is unusable.
    """
    model_config = read_config(folder)
    dtype = config.teacher_dtype
    return Recipe(
        weights=weights_fingerprint(folder),
        config=config_fingerprint(folder),
        tokenizer=tokenizer_fingerprint(folder),
        vocabulary=vocabulary_fingerprint(folder),
        vocab_size=head_width(model_config),
        chat_template=chat_template_fingerprint(folder),
        template_date=TEMPLATE_DATE,
        prefix=config.prefix,
        prefix_place=config.prefix_place,
        retain_prefix=config.retain_prefix,
        top_k=config.top_k,
        positions=config.positions,
        logit_dtype=config.logit_dtype,
        compute_dtype=stored_dtype(model_config) if dtype == "auto" else dtype,
        eos_token_ids=eos_token_ids(folder),
    )
