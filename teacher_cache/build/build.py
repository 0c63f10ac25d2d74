"""Build a cache: run the prefixed teacher once over a set of queries and write its signals.

The work is cut into shards by `plan`. Each finished shard stands under its final name with the
recipe and the queries in its own metadata, so a stopped build resumes without any other state: it
keeps the shards that belong to the same recipe and queries and computes the rest. The manifest
comes last and makes the cache a finished one.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from duet_unlearn.data.models.folder import (
    context_length,
    model_name,
    read_config,
    resolve_model_folder,
)
from duet_unlearn.data.models.tokenizer import control_tokens
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, fingerprint_queries
from duet_unlearn.errors import CacheError
from duet_unlearn.files import claimed_folder, make_folder
from duet_unlearn.progress import Progress
from duet_unlearn.teacher_cache.build.assemble import Assembly, PlannedCache, find_finished
from duet_unlearn.teacher_cache.build.check import check_teacher
from duet_unlearn.teacher_cache.build.config import BuildConfig, make_recipe
from duet_unlearn.teacher_cache.build.inputs import RenderedPrompts, load_query_set, render_prompts
from duet_unlearn.teacher_cache.build.lock import build_lock
from duet_unlearn.teacher_cache.build.plan import plan_shards
from duet_unlearn.teacher_cache.build.responses import cut_given
from duet_unlearn.teacher_cache.build.row_source import find_reusable, open_reusable
from duet_unlearn.teacher_cache.build.teacher import LocalTeacher, Teacher
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig
from duet_unlearn.teacher_cache.format.manifest import Manifest, PartOf, is_cache_folder
from duet_unlearn.teacher_cache.format.samples import collect_samples
from duet_unlearn.teacher_cache.format.schema import SHARD_FOLDER, CacheRow
from duet_unlearn.teacher_cache.format.signal import keep_mass
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.steering import ANSWER_TOKENS

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
    """Build the cache, resume a stopped build of it, or find it finished.

    Args:
        config: What to build.
        engine_factory: Starts the engine, in each worker if there are any; by default the one
            that `config.engine` names.

    Raises:
        ConfigurationError: A setting cannot work with this model.
        DataError: A query file or the model folder is unusable.
        MismatchError: The folder holds a cache of other inputs, or no row of a cache to reuse can
            be taken; the message lists what differs.
        CacheError: The folder cannot be written, or another build holds it.
        StoppedError: The user interrupted the build.
    """
    queries = load_query_set(config)
    model = resolve_model_folder(config.teacher)
    recipe = make_recipe(config, model)
    if config.plain_text or config.responses:
        tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
        if config.plain_text:
            tokens = control_tokens(tokenizer)
            queries = [query.as_plain_text(tokens) for query in queries]
        context = context_length(read_config(model))
        queries = cut_given(queries, PromptRenderer(tokenizer), tokenizer, recipe, context)
    own, part = queries, None
    if config.part is not None:
        own = config.part.select(queries)
        part = PartOf(
            number=config.part.number,
            count=config.part.count,
            queries=fingerprint_queries(queries),
        )
    shards = plan_shards(own, config.shard_rows)
    plan = PlannedCache(
        folder=config.out,
        recipe=recipe,
        queries=fingerprint_queries(own),
        shards=tuple(map(tuple, shards)),
        part=part,
    )
    manifest = find_finished(plan)
    if manifest is None:
        reusable = open_reusable(config.reuse, plan.recipe)  # refused before a folder is made
        with claimed_folder(config.out, is_cache_folder), build_lock(config.out):
            make_folder(config.out / SHARD_FOLDER)
            # Another build may have finished between the first look and the lock.
            manifest = find_finished(plan)
            if manifest is None:
                work = _Build(config, model, shards, Assembly(plan), reusable)
                return work.run(engine_factory)
    return BuildResult(manifest=manifest, hit=True, computed_rows=0, kept_rows=0, reused_rows=0)


class _Build:
    """One run of a build that holds the lock on its shards."""

    def __init__(
        self,
        config: BuildConfig,
        model: Path,
        shards: Sequence[Sequence[Query]],
        assembly: Assembly,
        reusable: Sequence[CacheReader],
    ) -> None:
        self.config = config
        self.model = model
        self.recipe = assembly.plan.recipe
        self.shards = shards
        self.assembly = assembly
        self.tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
        self.renderer = PromptRenderer(
            self.tokenizer, prefix=config.prefix, place=config.prefix_place
        )
        missing = assembly.missing
        readers = reusable if missing else ()
        self.reused = find_reusable(readers, self.recipe, shards, missing)
        self.check: dict[str, Any] | None = None

    def run(self, engine_factory: EngineFactory | None) -> BuildResult:
        """Write the missing shards and finish the cache."""
        assembly, places = self.assembly, self.reused.places
        try:
            for index in assembly.missing:
                if len(places[index]) == len(self.shards[index]):
                    self._write(index, {}, ())
            wanted = {
                index: {n for n in range(len(self.shards[index])) if n not in places[index]}
                for index in assembly.unfinished
            }
            if wanted:
                self._compute(wanted, engine_factory)
        except KeyboardInterrupt:
            raise assembly.stopped() from None
        samples = collect_samples(self.config.out, assembly.shards, self.tokenizer)
        return BuildResult(
            manifest=assembly.finish(model_name(self.config.teacher), samples, self.check),
            hit=False,
            computed_rows=sum(map(len, wanted.values())),
            kept_rows=assembly.kept_rows,
            reused_rows=sum(map(len, places.values())),
        )

    def _compute(
        self, wanted: Mapping[int, Collection[int]], engine_factory: EngineFactory | None
    ) -> None:
        """Run the teacher on the rows that no cache holds, given by shard and number in it."""
        context = context_length(read_config(self.model))
        prompts = render_prompts(self.shards, wanted, self.renderer, self.recipe, context)
        steered = self.config.check and self.config.prefix is not None
        answer_tokens = ANSWER_TOKENS if steered else 0
        if context is not None:
            answer_tokens = min(answer_tokens, context - prompts.longest)
        engine_config = EngineConfig(
            model=self.model,
            top_k=self.recipe.top_k,
            positions=self.recipe.positions,
            eos_token_ids=self.recipe.eos_token_ids,
            compute_dtype=self.recipe.compute_dtype,
            temperature=self.recipe.temperature,
            max_prompt_tokens=prompts.longest,
            max_new_tokens=answer_tokens,
            trust_remote_code=self.config.trust_remote_code,
            engine_args=self.config.engine_args,
        )
        with closing(self._open_teacher(engine_config, engine_factory)) as teacher:
            if answer_tokens:
                self.check = check_teacher(
                    teacher,
                    [query for shard in self.shards for query in shard],
                    self.renderer,
                    self.tokenizer,
                    retain_prefix=self.recipe.retain_prefix,
                    max_new_tokens=answer_tokens,
                )
            self._answer(teacher, prompts)

    def _open_teacher(
        self, engine_config: EngineConfig, engine_factory: EngineFactory | None
    ) -> Teacher:
        """Start the engine, or those of the workers."""
        # Imported here: a finished cache is found without them.
        from duet_unlearn.teacher_cache.build.workers import RayTeacher, WorkerJob
        from duet_unlearn.teacher_cache.engines import open_engine, resolve_engine_name

        config = self.config
        if config.workers is None:
            factory = engine_factory or partial(open_engine, config.engine)
            return LocalTeacher(factory(engine_config), self.recipe.strength)
        is_folder = Path(config.teacher).expanduser().is_dir()
        job = WorkerJob(
            teacher=str(self.model) if is_folder else config.teacher,
            recipe=self.recipe,
            engine=resolve_engine_name(config.engine),
            engine_config=engine_config,
            engine_factory=engine_factory,
        )
        return RayTeacher(job, workers=config.workers, address=config.ray_address)

    def _answer(self, teacher: Teacher, prompts: RenderedPrompts) -> None:
        """Feed every prompt to the teacher and write each shard as its last signal arrives."""
        top_p = self.recipe.top_p
        total = sum(len(shard.prompts) for shard in prompts.teacher)
        with Progress("teacher", total, "prompts") as progress:
            for answer in teacher.answer(prompts.teacher, progress.update):
                queries, student = self.shards[answer.index], prompts.student[answer.index]
                rows = {
                    number: CacheRow(
                        query_id=queries[number].query_id,
                        split=queries[number].split,
                        query=queries[number].text,
                        prompt_ids=student[number],
                        signal=signal if top_p == 1 else keep_mass(signal, top_p),
                    )
                    for number, signal in answer.signals.items()
                }
                self._write(answer.index, rows, (answer.engine,))
        if unfinished := self.assembly.unfinished:
            raise CacheError(
                f"{self.config.out}: the engine left {len(unfinished)} of {len(prompts.teacher)} "
                "shards without all their signals; run the same command again"
            )

    def _write(
        self, index: int, computed: Mapping[int, CacheRow], engines: tuple[dict[str, Any], ...]
    ) -> None:
        """Write a shard of computed rows and of those that are taken over under their new ids."""
        queries = self.shards[index]
        rows = dict(computed)
        for number, row in self.reused.take(index).items():
            query = queries[number]
            rows[number] = replace(row, query_id=query.query_id, split=query.split)
        origins = [engine for engine in self.reused.engines(index) if engine not in engines]
        ordered = [rows[number] for number in range(len(queries))]
        self.assembly.write(index, ordered, (*engines, *origins))
