"""Build a cache: run the prefixed teacher once over a set of queries and write its signals.

The work is cut into shards by `plan`. Each finished shard stands under its final name with the
recipe and the queries in its own metadata, so a stopped build goes on without any other state: it
keeps the shards that belong to the same recipe and queries and computes the rest. The manifest
comes last and makes the cache a finished one.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from duet_unlearn.data.errors import CacheError, StoppedError
from duet_unlearn.data.model_folder import (
    context_length,
    model_name,
    read_config,
    resolve_model_folder,
)
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import fingerprint_queries
from duet_unlearn.teacher_cache.build_config import BuildConfig, make_recipe
from duet_unlearn.teacher_cache.build_inputs import RenderedPrompts, load_query_set
from duet_unlearn.teacher_cache.card import write_card
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig
from duet_unlearn.teacher_cache.files import make_folder, remove_temporary_files
from duet_unlearn.teacher_cache.lock import build_lock
from duet_unlearn.teacher_cache.manifest import Manifest, ShardEntry
from duet_unlearn.teacher_cache.plan import plan_shards
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.resume import (
    PlannedCache,
    finished_shards,
    mismatch,
    rows_a_split,
)
from duet_unlearn.teacher_cache.samples import collect_samples
from duet_unlearn.teacher_cache.schema import MANIFEST_NAME, SHARD_FOLDER, SPLITS, CacheRow
from duet_unlearn.teacher_cache.shards import ShardFile, ShardHeader, write_shard
from duet_unlearn.teacher_cache.signals import Signal
from duet_unlearn.teacher_cache.statistics import SplitStatistics

logger = logging.getLogger(__name__)

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


def build(config: BuildConfig, engine_factory: EngineFactory | None = None) -> BuildResult:
    """Build the cache, go on with a stopped build of it, or find it finished.

    Args:
        config: What to build.
        engine_factory: Starts the engine; by default the one `config.engine` names.

    Raises:
        ConfigurationError: A setting cannot work with this model.
        DataError: A query file or the model folder is unusable.
        MismatchError: The folder holds a cache of other inputs; the message lists what differs.
        CacheError: The folder cannot be written, or another build holds it.
        StoppedError: The user interrupted the build.
    """
    queries = load_query_set(config)
    model = resolve_model_folder(config.teacher)
    plan = PlannedCache(
        folder=config.out,
        recipe=make_recipe(config, model),
        queries=fingerprint_queries(queries),
        shards=tuple(tuple(rows) for rows in plan_shards(queries, config.shard_rows)),
    )
    manifest = _find_finished(plan)
    if manifest is None:
        make_folder(config.out / SHARD_FOLDER)
        with build_lock(config.out):
            # Another build may have finished between the first look and the lock.
            manifest = _find_finished(plan)
            if manifest is None:
                return _Build(config, model, plan).run(engine_factory or _default_factory(config))
    return BuildResult(manifest=manifest, hit=True, computed_rows=0, kept_rows=0)


def _default_factory(config: BuildConfig) -> EngineFactory:
    from duet_unlearn.teacher_cache.engines import open_engine

    return lambda engine_config: open_engine(config.engine, engine_config)


def _find_finished(plan: PlannedCache) -> Manifest | None:
    """Return the manifest of a finished cache of these inputs, None where there is none yet."""
    if not (plan.folder / MANIFEST_NAME).exists():
        return None
    manifest = CacheReader.open(plan.folder).manifest
    differences = manifest.recipe.differences(plan.recipe)
    if manifest.queries != plan.queries:
        asked = rows_a_split([query for rows in plan.shards for query in rows])
        differences.append(
            "queries: "
            + " + ".join(f"{manifest.splits[split].rows} {split}" for split in SPLITS)
            + " / "
            + " + ".join(f"{asked[split]} {split}" for split in SPLITS)
            + ", not the same set"
        )
    if differences:
        raise mismatch(plan.folder, differences)
    return manifest


class _Build:
    """One run of a build that holds the folder's lock."""

    def __init__(self, config: BuildConfig, model: Path, plan: PlannedCache) -> None:
        self.config = config
        self.model = model
        self.plan = plan
        self.entries: dict[int, ShardEntry] = {}
        self.engine: dict[str, Any] = {}

    def run(self, engine_factory: EngineFactory) -> BuildResult:
        """Compute the missing shards and finish the cache."""
        remove_temporary_files(self.plan.folder / SHARD_FOLDER)
        self.entries = finished_shards(self.plan)
        kept = sum(entry.num_rows for entry in self.entries.values())
        if kept:
            logger.info("kept %d of %d shards", len(self.entries), len(self.plan.shards))
        tokenizer = load_tokenizer(self.model, trust_remote_code=self.config.trust_remote_code)
        missing = [i for i in range(len(self.plan.shards)) if i not in self.entries]
        if missing:
            renderer = PromptRenderer(
                tokenizer, prefix=self.config.prefix, place=self.config.prefix_place
            )
            try:
                self._compute(missing, renderer, engine_factory)
            except KeyboardInterrupt:
                raise StoppedError(
                    f"stopped: {len(self.entries)} of {len(self.plan.shards)} shards are finished "
                    f"in {self.plan.folder}; run the same command again, it goes on from there"
                ) from None
        shards = tuple(self.entries[i] for i in range(len(self.plan.shards)))
        samples = collect_samples(self.plan.folder, shards, tokenizer)
        computed = sum(len(self.plan.shards[i]) for i in missing)
        return BuildResult(
            manifest=self._finish(shards, samples),
            hit=False,
            computed_rows=computed,
            kept_rows=kept,
        )

    def _compute(
        self, missing: Sequence[int], renderer: PromptRenderer, engine_factory: EngineFactory
    ) -> None:
        recipe = self.plan.recipe
        queries = [query for i in missing for query in self.plan.shards[i]]
        prompts = RenderedPrompts(queries, renderer, retain_prefix=recipe.retain_prefix)
        prompts.check_length(context_length(read_config(self.model)), recipe.positions)
        engine = engine_factory(
            EngineConfig(
                model=self.model,
                top_k=recipe.top_k,
                positions=recipe.positions,
                eos_token_ids=recipe.eos_token_ids,
                compute_dtype=recipe.compute_dtype,
                max_prompt_tokens=prompts.longest,
                trust_remote_code=self.config.trust_remote_code,
            )
        )
        try:
            self.engine = engine.describe()
            self._stream(engine, missing, prompts)
        finally:
            engine.close()

    def _stream(self, engine: Engine, missing: Sequence[int], prompts: RenderedPrompts) -> None:
        """Feed every prompt to the engine and write each shard as its last signal arrives."""
        sizes = [len(self.plan.shards[i]) for i in missing]
        owner = np.repeat(missing, sizes)
        starts = dict(zip(missing, (np.cumsum(sizes) - sizes).tolist(), strict=True))
        pending: dict[int, dict[int, Signal]] = {}
        with tqdm(total=len(owner), desc="teacher", unit=" queries", disable=None) as progress:
            for number, signal in engine.signals(enumerate(prompts.teacher)):
                index = int(owner[number])
                signals = pending.setdefault(index, {})
                signals[number - starts[index]] = signal
                progress.update()
                if len(signals) == len(self.plan.shards[index]):
                    self._write(index, pending.pop(index), prompts.student[starts[index] :])
        if unfinished := [i for i in missing if i not in self.entries]:
            raise CacheError(
                f"{self.plan.folder}: the engine left {len(unfinished)} of {len(missing)} shards "
                "without all their signals; run the same command again"
            )

    def _write(
        self, index: int, signals: dict[int, Signal], student: Sequence[npt.NDArray[np.int32]]
    ) -> None:
        rows = [
            CacheRow(
                query_id=query.query_id,
                split=query.split,
                query=query.text,
                prompt_ids=student[number],
                signal=signals[number],
            )
            for number, query in enumerate(self.plan.shards[index])
        ]
        header = ShardHeader(
            recipe=self.plan.recipe,
            queries=self.plan.queries,
            index=index,
            count=len(self.plan.shards),
            engines=(self.engine,),
        )
        self.entries[index] = write_shard(self.plan.folder, rows, header)

    def _finish(
        self, shards: tuple[ShardEntry, ...], samples: tuple[dict[str, Any], ...]
    ) -> Manifest:
        totals = {split: SplitStatistics() for split in SPLITS}
        engines: list[dict[str, Any]] = []
        for index in range(len(shards)):
            file = ShardFile(self.plan.shard_path(index))
            for split in SPLITS:
                totals[split] += file.statistics[split]
            engines.extend(engine for engine in file.header.engines if engine not in engines)
            file.close()
        manifest = Manifest(
            recipe=self.plan.recipe,
            teacher=model_name(self.config.teacher),
            queries=self.plan.queries,
            engines=tuple(engines),
            shards=shards,
            splits=totals,
            samples=samples,
        )
        manifest = replace(manifest, digest=manifest.to_json()["digest"])
        write_card(self.plan.folder, manifest)
        return manifest.write(self.plan.folder)
