"""Build a cache: run the prefixed teacher once over a set of queries and write its signals.

The work is cut into shards by `plan`. Each finished shard stands under its final name with the
recipe and the queries in its own metadata, so a stopped build goes on without any other state: it
keeps the shards that belong to the same recipe and queries and computes the rest. The manifest
comes last and makes the cache a finished one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from duet_unlearn.data.errors import CacheError
from duet_unlearn.data.model_folder import (
    context_length,
    model_name,
    read_config,
    resolve_model_folder,
)
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, fingerprint_queries
from duet_unlearn.teacher_cache.assemble import Assembly, find_finished
from duet_unlearn.teacher_cache.build_config import BuildConfig, make_recipe
from duet_unlearn.teacher_cache.build_inputs import RenderedPrompts, load_query_set
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig
from duet_unlearn.teacher_cache.files import make_folder
from duet_unlearn.teacher_cache.lock import build_lock
from duet_unlearn.teacher_cache.manifest import Manifest
from duet_unlearn.teacher_cache.plan import plan_shards
from duet_unlearn.teacher_cache.resume import PlannedCache
from duet_unlearn.teacher_cache.reuse import ReusedRows
from duet_unlearn.teacher_cache.samples import collect_samples
from duet_unlearn.teacher_cache.schema import SHARD_FOLDER, CacheRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EngineFactory = Callable[[EngineConfig], Engine]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What a build did."""

    manifest: Manifest
    hit: bool
    """The finished cache was already there; nothing ran."""
    computed_rows: int
    """Queries that the teacher ran on."""
    kept_rows: int
    """Queries taken over from the finished shards of a stopped build."""
    reused_rows: int
    """Queries taken over from other caches."""


def build(config: BuildConfig, engine_factory: EngineFactory | None = None) -> BuildResult:
    """Build the cache, go on with a stopped build of it, or find it finished.

    Args:
        config: What to build.
        engine_factory: Starts the engine; by default the one `config.engine` names.

    Raises:
        ConfigurationError: A setting cannot work with this model.
        DataError: A query file or the model folder is unusable.
        MismatchError: The folder holds a cache of other inputs, or a cache to reuse has another
            recipe; the message lists what differs.
        CacheError: The folder cannot be written, or another build holds it.
        StoppedError: The user interrupted the build.
    """
    queries = load_query_set(config)
    model = resolve_model_folder(config.teacher)
    shards = plan_shards(queries, config.shard_rows)
    plan = PlannedCache(
        folder=config.out,
        recipe=make_recipe(config, model),
        queries=fingerprint_queries(queries),
        shards=tuple(map(tuple, shards)),
    )
    manifest = find_finished(plan)
    if manifest is None:
        make_folder(config.out / SHARD_FOLDER)
        with build_lock(config.out):
            # Another build may have finished between the first look and the lock.
            manifest = find_finished(plan)
            if manifest is None:
                run = _Build(config, model, plan, shards)
                return run.run(engine_factory or _default_factory(config))
    return BuildResult(manifest=manifest, hit=True, computed_rows=0, kept_rows=0, reused_rows=0)


def _default_factory(config: BuildConfig) -> EngineFactory:
    from duet_unlearn.teacher_cache.engines import open_engine

    return lambda engine_config: open_engine(config.engine, engine_config)


class _Build:
    """One run of a build that holds the folder's lock."""

    def __init__(
        self, config: BuildConfig, model: Path, plan: PlannedCache, shards: Sequence[list[Query]]
    ) -> None:
        self.config = config
        self.model = model
        self.recipe = plan.recipe
        self.shards = shards
        self.assembly = Assembly(plan)

    def run(self, engine_factory: EngineFactory) -> BuildResult:
        """Write the missing shards and finish the cache."""
        missing = self.assembly.missing
        reused = ReusedRows(self.config.reuse if missing else (), self.recipe, self.shards, missing)
        tokenizer = load_tokenizer(self.model, trust_remote_code=self.config.trust_remote_code)
        computed = 0
        try:
            for index in missing:
                if all(reused.holds(index, n) for n in range(len(self.shards[index]))):
                    self._write(index, {}, (), reused)
            if self.assembly.unfinished:
                computed = self._compute(reused, tokenizer, engine_factory)
        except KeyboardInterrupt:
            raise self.assembly.stopped() from None
        samples = collect_samples(self.config.out, self.assembly.shards, tokenizer)
        return BuildResult(
            manifest=self.assembly.finish(model_name(self.config.teacher), samples),
            hit=False,
            computed_rows=computed,
            kept_rows=self.assembly.kept_rows,
            reused_rows=reused.count,
        )

    def _compute(
        self,
        reused: ReusedRows,
        tokenizer: "PreTrainedTokenizerBase",
        engine_factory: EngineFactory,
    ) -> int:
        """Run the teacher on the queries that no cache holds; return how many those are."""
        places = [
            (index, number)
            for index in self.assembly.unfinished
            for number in range(len(self.shards[index]))
            if not reused.holds(index, number)
        ]
        renderer = PromptRenderer(
            tokenizer, prefix=self.config.prefix, place=self.config.prefix_place
        )
        prompts = RenderedPrompts(
            [self.shards[index][number] for index, number in places],
            renderer,
            retain_prefix=self.recipe.retain_prefix,
        )
        prompts.check_length(context_length(read_config(self.model)), self.recipe.positions)
        engine = engine_factory(
            EngineConfig(
                model=self.model,
                top_k=self.recipe.top_k,
                positions=self.recipe.positions,
                eos_token_ids=self.recipe.eos_token_ids,
                compute_dtype=self.recipe.compute_dtype,
                max_prompt_tokens=prompts.longest,
                trust_remote_code=self.config.trust_remote_code,
            )
        )
        try:
            self._stream(engine, places, prompts, reused)
        finally:
            engine.close()
        return len(places)

    def _stream(
        self,
        engine: Engine,
        places: Sequence[tuple[int, int]],
        prompts: RenderedPrompts,
        reused: ReusedRows,
    ) -> None:
        """Feed every prompt to the engine and write each shard as its last signal arrives."""
        description = engine.describe()
        due = Counter(index for index, _ in places)
        pending: dict[int, dict[int, CacheRow]] = {}
        with tqdm(total=len(places), desc="teacher", unit=" queries", disable=None) as progress:
            for prompt, signal in engine.signals(enumerate(prompts.teacher)):
                index, number = places[prompt]
                query = self.shards[index][number]
                rows = pending.setdefault(index, {})
                rows[number] = CacheRow(
                    query_id=query.query_id,
                    split=query.split,
                    query=query.text,
                    prompt_ids=prompts.student[prompt],
                    signal=signal,
                )
                progress.update()
                if len(rows) == due[index]:
                    self._write(index, pending.pop(index), (description,), reused)
        if unfinished := self.assembly.unfinished:
            raise CacheError(
                f"{self.config.out}: the engine left {len(unfinished)} of {len(due)} shards "
                "without all their signals; run the same command again"
            )

    def _write(
        self,
        index: int,
        computed: dict[int, CacheRow],
        engines: tuple[dict[str, Any], ...],
        reused: ReusedRows,
    ) -> None:
        rows = computed | reused.take(index)
        origins = [engine for engine in reused.engines(index) if engine not in engines]
        self.assembly.write(
            index, [rows[number] for number in range(len(rows))], (*engines, *origins)
        )
