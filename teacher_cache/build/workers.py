"""Many engines on a Ray cluster: each shard is a task for one of N actors.

Ray starts the actors where there is room, starts one anew that died, and gives its shard to it
again. Signals come back through Ray's object store and are written by the one process that holds
the folder, so workers need no shared file system. An actor has at most two shards: the one it works
on, and one that waits for it or to be fetched; memory is bounded by that.
"""

import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from duet_unlearn import __version__
from duet_unlearn.data.models.fingerprint import config_fingerprint, weights_fingerprint
from duet_unlearn.data.models.folder import resolve_model_folder
from duet_unlearn.errors import DuetError, MismatchError
from duet_unlearn.teacher_cache.build.ray_cluster import connected, worker_resources
from duet_unlearn.teacher_cache.build.teacher import (
    LocalTeacher,
    Progress,
    ShardPrompts,
    ShardSignals,
)
from duet_unlearn.teacher_cache.engines import open_engine
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig, cause
from duet_unlearn.teacher_cache.engines.options import gpus_of_engine
from duet_unlearn.teacher_cache.format.recipe import Recipe

logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often Ray starts one worker anew before the build ends."""
_CLOSE_SECONDS = 20.0
_SHARDS_A_WORKER = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerJob:
    """What a worker needs to know, wherever it runs."""

    teacher: str
    """The model: an absolute folder that exists on every machine, or a hub id."""
    recipe: Recipe
    """The worker's model must have its fingerprints."""
    engine: str
    """`vllm` or `transformers`."""
    engine_config: EngineConfig
    """As for one engine; the model is where it lies on the worker's machine."""
    engine_factory: Callable[[EngineConfig], Engine] | None = None
    """Starts the engine in place of the one named."""
    version: str = __version__


class Worker:
    """One engine in a process of Ray's."""

    def __init__(self, job: WorkerJob) -> None:
        self._job = job
        self._teacher: LocalTeacher | None = None

    def answer(self, shard: ShardPrompts) -> ShardSignals:
        """Return a shard's signals.

        The engine starts with the first shard, not with the actor: Ray would hand on what goes
        wrong there as its own failure.

        Raises:
            DuetError: The engine does not start or fails.
        """
        try:
            if self._teacher is None:
                self._teacher = self._open()
            [answer] = self._teacher.answer([shard], lambda _: None)
        except DuetError as error:
            # A class of ours travels as it is; the machine is what the message lacks.
            raise type(error)(f"worker on {socket.gethostname()}: {error}") from None
        return answer

    def _open(self) -> LocalTeacher:
        job = self._job
        if job.version != __version__:
            raise MismatchError(
                f"duet-unlearn is {__version__} there and {job.version} here; install the same"
            )
        model = resolve_model_folder(job.teacher)
        for name, fingerprint in (("weights", weights_fingerprint), ("config", config_fingerprint)):
            found, expected = fingerprint(model), getattr(job.recipe, name)
            if found != expected:
                raise MismatchError(
                    f"model {model} has other {name} there ({found[:19]}) than here "
                    f"({expected[:19]}); copy the model to that machine"
                )
        config = replace(job.engine_config, model=model)
        factory = job.engine_factory or (lambda config: open_engine(job.engine, config))
        return LocalTeacher(factory(config))

    def close(self) -> None:
        """End the engine."""
        if self._teacher is not None:
            self._teacher.close()


class RayTeacher:
    """Answers shards with N workers on a Ray cluster."""

    def __init__(self, job: WorkerJob, *, workers: int, address: str) -> None:
        """Connect to the cluster, or start one on this machine, and ask it for the workers.

        Args:
            job: What every worker does.
            workers: How many.
            address: `local`, `auto`, or where the cluster is.

        Raises:
            ConfigurationError: Ray is not installed, there is no cluster at the address, or it has
                no room for so many workers.
        """
        self._exit = contextlib.ExitStack()
        self._actors: list[Any] = []
        self._ray = ray = self._exit.enter_context(connected(address))
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            needs = worker_resources(nodes, workers, gpus_of_engine(job.engine, _options(job)))
            actor = ray.remote(Worker).options(**needs, max_restarts=RESTARTS, max_task_retries=-1)
            self._actors = [actor.remote(job) for _ in range(workers)]
        except BaseException:
            self.close()
            raise
        what = ", ".join(f"{name.removeprefix('num_')} {count:g}" for name, count in needs.items())
        logger.info("%d workers on %d machines (each: %s)", workers, len(nodes), what)

    def answer(self, work: Iterable[ShardPrompts], progress: Progress) -> Iterator[ShardSignals]:
        """Yield every shard's signals; see `Teacher.answer`."""
        from ray.util import ActorPool

        # An actor that is in the pool twice has its next shard at hand while its last is fetched.
        pool = ActorPool(self._actors * _SHARDS_A_WORKER)
        for shard in work:
            if not pool.has_free():
                yield self._next(pool, progress)
            pool.submit(lambda actor, prompts: actor.answer.remote(prompts), shard)
        while pool.has_next():
            yield self._next(pool, progress)
        for actor in self._actors:  # in good time, which a kill does not give
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(actor.close.remote(), timeout=_CLOSE_SECONDS)

    def _next(self, pool: Any, progress: Progress) -> ShardSignals:
        exceptions = self._ray.exceptions
        try:
            answer: ShardSignals = pool.get_next_unordered()
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, DuetError):
                raise type(error.cause)(str(error.cause)) from None
            reason = cause(error.cause if isinstance(error.cause, Exception) else error)
            raise DuetError(f"a worker failed: {reason}; run the same command again") from error
        except exceptions.RayError as error:
            raise DuetError(
                f"a worker ended and was replaced {RESTARTS} times, or could not start "
                f"({_last_error(str(error))}); check the memory of its machine and that "
                "duet-unlearn is installed there, then run the same command again: what is "
                "finished is kept"
            ) from error
        progress(len(answer.signals))
        return answer

    def close(self) -> None:
        """End the workers, and the cluster if it was started here; safe to call twice."""
        for actor in self._actors:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor, no_restart=True)
        self._actors = []
        self._exit.close()


def _options(job: WorkerJob) -> dict[str, Any]:
    return dict(job.engine_config.engine_args)


def _last_error(text: str) -> str:
    """Return the last thing that looks like an exception in what Ray says, else its first line."""
    found = re.findall(r"\b\w+(?:Error|Exception): .+", text)
    return (found[-1] if found else text.strip().splitlines()[0])[:300]
