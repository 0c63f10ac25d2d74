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
from duet_unlearn.data.models.folder import (
    context_length,
    eos_token_ids,
    head_width,
    read_config,
)
from duet_unlearn.data.models.loading import Dtype
from duet_unlearn.data.prompts import TEMPLATE_DATE, Place
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.settings import Count, NotNegative, Positive, Settings, Whole, setting, settings
from duet_unlearn.teacher_cache.build.plan import Part, check_shard_rows
from duet_unlearn.teacher_cache.engines import options, resolve_engine_name
from duet_unlearn.teacher_cache.format.recipe import Recipe

PLAIN_POSITIONS = 1024
"""Most positions of a row without a steering prefix, where none are asked for: a whole answer."""


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
    train: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        help="For ordinary distillation, with --no-prefix: queries that the teacher answers, same "
        "formats. Repeatable.",
    )
    responses: tuple[str, ...] = setting(
        default=(),
        metavar="FILE",
        help="The same, with responses that are given: the teacher is asked along them. `messages` "
        "that end with the assistant's turn, a query with a `response`, or a `text`. Repeatable.",
    )
    views: tuple[str, ...] = setting(
        default=(),
        flag="--view",
        metavar="FILE|@NAME",
        help="Also cache what the plain base says to the retain queries in these shapes, so that a "
        "student can be trained in them: @view-shapes, or a file with one shape per line. "
        "Repeatable.",
    )
    views_per_query: Count | None = setting(
        default=None,
        help="Cache each retain query in this many of them, drawn by its text; every pass of a run "
        "draws one.  [default: all]",
    )
    prefix: str | None = setting(
        group="How to steer", flag=None, help="The steering prefix in full; None steers nothing."
    )
    prefix_place: Place = setting(
        default="system",
        help="Where the prefix goes: system turn, front of the user turn, or in front of it all.",
    )
    retain_prefix: bool = setting(
        default=True,
        flag="--retain-prefix/--no-retain-prefix",
        help="Put the prefix in front of retain queries too (the paper's Eq. 3).",
    )
    strength: NotNegative = setting(
        default=0.0,
        help="Move what is cached for forget queries by this much further from what the base says "
        "without the prefix.",
    )
    temperature: NotNegative = setting(
        default=0.0,
        group="How to answer",
        help="Sample the answers to --train at this temperature; 0 decodes them greedily. What is "
        "cached is the same: raw logits, along the sampled tokens.",
    )
    samples: Count = setting(default=1, help="Sampled answers to each query, a row each.")
    seed: Whole = setting(
        default=0, help="Another seed gives other samples, the same seed the same."
    )
    top_k: Count = setting(default=100, group="What to keep", help="Tokens kept per position.")
    top_p: Positive = setting(
        default=1.0,
        help="Of those, keep the fewest that hold this share of the teacher's mass; 1 keeps all.",
    )
    keep: Literal["strongest", "sampled"] = setting(
        default="strongest",
        help="Keep the K strongest tokens of a position, or the tokens of K draws from the "
        "teacher's distribution with their counts: an unbiased estimate, for --loss kl-tail.",
    )
    positions: Count | None = setting(
        default=None,
        help="Decoding steps kept per query; longer given responses are several rows.  [default: "
        f"1; with --no-prefix {PLAIN_POSITIONS}, at most half the context]",
    )
    score: Literal["assistant", "all"] = setting(
        default="assistant",
        help="What is kept of --responses: the assistant's turns, a row each, or every token.",
    )
    logit_dtype: Literal["float16", "float32"] | None = setting(
        default=None,
        help="How logits are stored.  [default: float16; with --keep sampled float32, which takes "
        "no more room there]",
    )
    shard_rows: Count = setting(default=1024, help="Queries in one shard.")
    reuse: tuple[str, ...] = setting(
        default=(),
        metavar="CACHE",
        help="Take over rows of a cache that this one would hold too. Repeatable.",
    )
    engine: options.EngineName = options.ENGINE()
    check: bool = setting(
        default=True,
        flag="--check/--no-check",
        help="First ask a sample of the queries with the prefix and without it, record what comes "
        "back of the base's answers, and warn of a teacher that does not forget or does not keep.",
    )
    engine_args: Mapping[str, Any] = options.ENGINE_ARGS()
    teacher_dtype: Dtype = options.TEACHER_DTYPE()
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
        if self.prefix is not None and not self.prefix.strip():
            raise ConfigurationError(
                "the steering prefix is empty; give --prefix a text or the @NAME of a built-in "
                "one, or --no-prefix for ordinary distillation"
            )
        if self.views_per_query is not None and not self.views:
            raise ConfigurationError(
                f"views_per_query is {self.views_per_query}, but there are no views; give --view, "
                "or leave it out"
            )
        if self.prefix is None and self.forget:
            raise ConfigurationError(
                "without a prefix nothing is forgotten; leave --forget out, or give --prefix"
            )
        if self.prefix is None and self.strength:
            raise ConfigurationError(
                "--strength strengthens what a prefix does; leave it out, or give --prefix"
            )
        if self.prefix is not None and (self.train or self.responses):
            raise ConfigurationError(
                "--train and --responses take the teacher as it is; give --no-prefix, and cache "
                "what is to be forgotten apart"
            )
        if self.temperature and not self.train:
            raise ConfigurationError(
                "--temperature samples the answers to --train alone; give --no-prefix and --train "
                "FILE, or leave it out"
            )
        is_sampled = self.keep == "sampled"
        if is_sampled and (self.prefix is not None or self.top_p < 1):
            raise ConfigurationError(
                "--keep sampled goes with --no-prefix, for raw logits are not estimated by draws, "
                "and without --top-p; leave one of them out"
            )
        if is_sampled and self.logit_dtype == "float16":
            raise ConfigurationError(
                "--keep sampled counts draws, which float16 would round; leave --logit-dtype out"
            )
        if is_sampled and not self.temperature and self.samples > 1:
            raise ConfigurationError(
                "without --temperature answers are greedy, one a query; give it above 0, or leave "
                "--samples out"
            )
        if not is_sampled and not self.temperature and (self.samples > 1 or self.seed):
            raise ConfigurationError(
                "without --temperature answers are greedy, one a query; give it above 0, or leave "
                "--samples and --seed out"
            )
        if not (self.forget or self.retain or self.train or self.responses):
            raise ConfigurationError(
                "no queries; give --forget FILE, and --retain FILE beside it, or with --no-prefix "
                "--train FILE or --responses FILE"
            )
        check_shard_rows(self.shard_rows, self.top_k, self.positions or 1)
        if self.engine_args:
            options.check_options(resolve_engine_name(self.engine), self.engine_args)


def make_recipe(config: BuildConfig, folder: Path) -> Recipe:
    """Return the recipe of a build; reads and hashes the model folder, loads nothing.

    Raises:
        ConfigurationError: A setting is out of range for this model.
        DataError: The model folder is unusable.
    """
    model_config = read_config(folder)
    positions = config.positions
    if positions is None:
        limits = (PLAIN_POSITIONS, (context_length(model_config) or 1 << 30) // 2)
        positions = 1 if config.prefix is not None else max(1, min(limits))
        check_shard_rows(config.shard_rows, config.top_k, positions)
    return Recipe(
        weights=weights_fingerprint(folder),
        config=config_fingerprint(folder, with_code=config.trust_remote_code),
        tokenizer=tokenizer_fingerprint(folder),
        vocabulary=vocabulary_fingerprint(folder, trust_remote_code=config.trust_remote_code),
        vocab_size=head_width(model_config),
        chat_template=chat_template_fingerprint(folder),
        template_date=TEMPLATE_DATE,
        prefix=config.prefix or "",
        # What says nothing without a prefix or without responses makes no other recipe.
        prefix_place=config.prefix_place if config.prefix else "system",
        strength=config.strength,
        temperature=config.temperature,
        seed=config.seed,
        top_p=config.top_p,
        keep=config.keep,
        retain_prefix=config.retain_prefix or not config.prefix,
        top_k=config.top_k,
        positions=positions,
        logit_dtype="float32" if config.keep == "sampled" else config.logit_dtype or "float16",
        compute_dtype=options.compute_dtype(
            config.teacher_dtype, folder, elsewhere=config.ray_address != "local"
        ),
        eos_token_ids=eos_token_ids(folder),
        scored=config.score if config.responses else "assistant" if config.train else None,
    )
