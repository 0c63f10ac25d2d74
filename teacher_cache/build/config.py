"""What a build is asked to do, and the recipe that follows from it and the model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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
from duet_unlearn.settings import Count, Settings, setting, settings
from duet_unlearn.teacher_cache.build.plan import Part, check_shard_rows
from duet_unlearn.teacher_cache.engines import options, resolve_engine_name
from duet_unlearn.teacher_cache.format.recipe import Recipe


@settings
class BuildConfig(Settings):
    """Settings of `duet-cache build`."""

    teacher: str = setting(
        group="What to cache", metavar="MODEL", help="Model folder or hub id of the base model."
    )
    out: Path = setting(metavar="DIR", help="The cache folder to write.")
    forget: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        help="Queries to forget: JSONL, CSV, Parquet, a kit such as @harry-potter, or "
        "hub:NAME[:CONFIG][:SPLIT]. Repeatable.",
    )
    retain: tuple[str, ...] = setting(
        default=(), metavar="FILE", help="Queries to keep, same formats. Repeatable."
    )
    views: tuple[str, ...] = setting(
        default=(),
        flag="--view",
        metavar="FILE|@NAME",
        help="Also cache what the plain base says to the retain queries in these shapes, so that a "
        "student can be trained in them: @view-shapes, or a file with one shape per line. "
        "Repeatable.",
    )
    prefix: str = setting(group="How to steer", flag=None, help="The steering prefix in full.")
    prefix_place: Literal["system", "user", "raw"] = setting(
        default="system",
        help="Where the prefix goes: system turn, front of the user turn, or in front of it all.",
    )
    retain_prefix: bool = setting(
        default=True,
        flag="--retain-prefix/--no-retain-prefix",
        help="Put the prefix in front of retain queries too (the paper's Eq. 3).",
    )
    top_k: Count = setting(default=100, group="What to keep", help="Tokens kept per position.")
    positions: Count = setting(default=1, help="Decoding steps kept per query.")
    logit_dtype: Literal["float16", "float32"] = setting(
        default="float16", help="How logits are stored."
    )
    shard_rows: Count = setting(default=1024, help="Queries in one shard.")
    reuse: tuple[str, ...] = setting(
        default=(),
        metavar="CACHE",
        help="Take over the rows of a cache of the same recipe. Repeatable.",
    )
    engine: options.EngineName = options.ENGINE()
    check: bool = setting(
        default=True,
        flag="--check/--no-check",
        help="First ask a sample of the queries with the prefix and without it, record what comes "
        "back of the base's answers, and warn of a teacher that does not forget or does not keep.",
    )
    engine_args: Mapping[str, Any] = options.ENGINE_ARGS()
    teacher_dtype: options.TeacherDtype = options.TEACHER_DTYPE()
    plain_text: bool = setting(
        default=False,
        help="Read control tokens that a query spells, such as <|im_end|>, as text.",
    )
    trust_remote_code: bool = options.TRUST_REMOTE_CODE()
    part: Part | None = setting(
        default=None,
        group="Many machines",
        flag=None,
        help="Build this part of the queries alone, for `merge` to join with the others.",
    )
    workers: Count | None = setting(
        default=None, metavar="N", help="Run N engines at the same time on a Ray cluster."
    )
    ray_address: str = setting(
        default="local",
        flag="--ray",
        metavar="ADDRESS",
        help="The Ray cluster for --workers: its address, auto, or local for this machine.",
    )

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if not self.prefix.strip():
            raise ConfigurationError(
                "the steering prefix is empty; give --prefix a text or the @NAME of a built-in one"
            )
        if not self.forget and not self.retain:
            raise ConfigurationError("no queries; give --forget FILE, and --retain FILE beside it")
        check_shard_rows(self.shard_rows, self.top_k, self.positions)
        if self.engine_args:
            options.check_options(resolve_engine_name(self.engine), self.engine_args)


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
