"""Many engines on a Ray cluster: each shard is a task for one of N actors.

Ray starts the actors where there is room, starts one anew that died, and gives its shard to it
again. Signals come back through Ray's object store and are written by the one process that holds
the folder, so workers need no shared file system. An actor has at most two shards: the one it works
on, and one that waits for it or to be fetched; memory is bounded by that.
"""

import contextlib
import io
import logging
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from duet_unlearn import __version__
from duet_unlearn.data.models.fingerprint import config_fingerprint, weights_fingerprint
from duet_unlearn.data.models.folder import resolve_model_folder
from duet_unlearn.errors import ConfigurationError, DuetError, MismatchError
from duet_unlearn.teacher_cache.build.teacher import (
    LocalTeacher,
    Progress,
    Prompts,
    ShardPrompts,
    ShardSignals,
)
from duet_unlearn.teacher_cache.engines import open_engine
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig, cause
from duet_unlearn.teacher_cache.engines.options import gpus_of_engine
from duet_unlearn.teacher_cache.format.recipe import Recipe

logger = logging.getLogger(__name__)

MISSING = (
    "--workers needs Ray, which is not installed: pip install 'duet-unlearn[ray]', or build in "
    "parts with --shards I/N"
)
RESTARTS = 3
"""How often Ray starts one worker anew before the build ends."""
_CLOSE_SECONDS = 20.0
_SHARDS_A_WORKER = 2
_LONGEST_TEMPORARY = 36
"""Most bytes in the path of a temporary folder in which Ray can put its sockets: their paths may
have 107, of which Ray's own names take some 70."""


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
    """One engine in a process of Ray's.

    It starts with the first call, not with the actor: Ray would hand on what goes wrong there as
    its own failure.
    """

    def __init__(self, job: WorkerJob) -> None:
        self._job = job
        self._opened: LocalTeacher | None = None

    def answer(self, shard: ShardPrompts) -> ShardSignals:
        """Return a shard's signals."""
        with _naming_this_machine():
            [answer] = self._teacher().answer([shard], lambda _: None)
        return answer

    def responses(self, prompts: Prompts, max_new_tokens: int) -> list[tuple[int, list[int]]]:
        """Return greedy answers to a few prompts."""
        with _naming_this_machine():
            return list(self._teacher().responses(prompts, max_new_tokens))

    def _teacher(self) -> LocalTeacher:
        job = self._job
        if self._opened is not None:
            return self._opened
        if job.version != __version__:
            raise MismatchError(
                f"duet-unlearn is {__version__} there and {job.version} here; install the same"
            )
        model = resolve_model_folder(job.teacher)
        with_code = job.engine_config.trust_remote_code
        for name, found in (
            ("weights", weights_fingerprint(model)),
            ("config", config_fingerprint(model, with_code=with_code)),
        ):
            expected = getattr(job.recipe, name)
            if found != expected:
                raise MismatchError(
                    f"model {model} has other {name} there ({found[:19]}) than here "
                    f"({expected[:19]}); copy the model to that machine"
                )
        config = replace(job.engine_config, model=model)
        factory = job.engine_factory or (lambda config: open_engine(job.engine, config))
        self._opened = LocalTeacher(factory(config), job.recipe.strength)
        return self._opened

    def close(self) -> None:
        """End the engine."""
        if self._opened is not None:
            self._opened.close()


@contextlib.contextmanager
def _naming_this_machine() -> Iterator[None]:
    try:
        yield
    except DuetError as error:
        # A class of ours travels as it is; the machine is what the message lacks.
        raise type(error)(f"worker on {socket.gethostname()}: {error}") from None


class RayTeacher:
    """Answers shards with N workers on a Ray cluster.

    Args:
        job: What every worker does.
        workers: How many.
        address: `local`, `auto`, or where the cluster is.

    Raises:
        ConfigurationError: Ray is not installed, there is no cluster at the address, or it has
            no room for so many workers.
    """

    def __init__(self, job: WorkerJob, *, workers: int, address: str) -> None:
        self._exit = contextlib.ExitStack()
        self._actors: list[Any] = []
        self._ray = ray = self._exit.enter_context(connected(address))
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus = gpus_of_engine(job.engine, dict(job.engine_config.engine_args))
            needs = worker_resources(nodes, workers, gpus)
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
        with self._explained():
            for answer in pool.map_unordered(lambda actor, own: actor.answer.remote(own), work):
                progress(len(answer.signals))
                yield answer
        for actor in self._actors:  # in good time, which a kill does not give
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(actor.close.remote(), timeout=_CLOSE_SECONDS)

    def responses(self, prompts: Prompts, max_new_tokens: int) -> Iterable[tuple[int, list[int]]]:
        """Return greedy answers of one worker; see `Teacher.responses`."""
        with self._explained():
            answers: list[tuple[int, list[int]]] = self._ray.get(
                self._actors[0].responses.remote(prompts, max_new_tokens)
            )
        return answers

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what Ray raises into one line."""
        exceptions = self._ray.exceptions
        try:
            yield
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, DuetError):
                raise type(error.cause)(str(error.cause)) from None
            reason = cause(error.cause if isinstance(error.cause, Exception) else error)
            raise DuetError(f"a worker failed: {reason}; run the same command again") from error
        except exceptions.RayError as error:
            # The last thing that looks like an exception in what Ray says, else its first line.
            found = re.findall(r"\b\w+(?:Error|Exception): .+", str(error))
            reason = (found[-1] if found else str(error).strip().splitlines()[0])[:300]
            raise DuetError(
                f"a worker ended and was replaced {RESTARTS} times, or could not start "
                f"({reason}); check the memory of its machine and that duet-unlearn is installed "
                "there, then run the same command again: what is finished is kept"
            ) from error

    def close(self) -> None:
        """End the workers, and the cluster if it was started here; safe to call twice."""
        for actor in self._actors:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor, no_restart=True)
        self._actors = []
        self._exit.close()


def worker_resources(
    nodes: Sequence[dict[str, float]], workers: int, gpus: int
) -> dict[str, float]:
    """Return what to ask Ray for, a worker.

    Where the cluster has GPUs, a worker gets those its engine needs. Elsewhere it gets an equal
    share of the CPUs, as many as let all workers run at once; Ray sets its number of threads to
    that, so that engines on one machine do not fight.

    Args:
        nodes: What each machine of the cluster offers, by Ray's names.
        workers: How many workers.
        gpus: GPUs that one engine takes.

    Raises:
        ConfigurationError: The cluster is too small.
    """

    def room(name: str, each: int) -> int:
        return sum(int(node.get(name, 0)) // each for node in nodes)

    if room("GPU", 1):
        if room("GPU", gpus) < workers:
            raise ConfigurationError(
                f"{workers} workers of {gpus} GPUs each, but this Ray cluster has room for "
                f"{room('GPU', gpus)}; lower --workers or tensor_parallel_size"
            )
        return {"num_cpus": 1, "num_gpus": gpus}
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    for cpus in range(most, 0, -1):
        if room("CPU", cpus) >= workers:
            return {"num_cpus": cpus}
    raise ConfigurationError(
        f"{workers} workers, but this Ray cluster has {room('CPU', 1)} CPUs and no GPU; lower "
        "--workers"
    )


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a Ray cluster, quietly, and give the `ray` module.

    A connection that this process has already is used, and stays.

    Args:
        address: `local` starts a cluster on this machine that ends with the connection; `auto` is
            the one that this machine belongs to; else where it is.

    Raises:
        ConfigurationError: Ray is not installed, or there is no cluster at the address.
    """
    with contextlib.ExitStack() as stack:
        if address == "local" and "ray" not in sys.modules:
            # Ray reads this when it is imported. Whoever reaches a cluster can run code on it, so
            # the one that we start listens on loopback alone and takes nobody without the token.
            alone = {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback on every system
            }
            stack.enter_context(_environment(alone))
        try:
            import ray
        except ImportError as error:
            raise ConfigurationError(MISSING) from error
        # Ray prints notes on standard output, which belongs to results.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not ray.is_initialized():
            _connect(ray, address)
            stack.callback(ray.shutdown)
        yield ray


def _connect(ray: Any, address: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    # Ray makes workers nice: beside other work on this machine they would get nothing.
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    too_long = len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPORARY
    if options and too_long and "RAY_TMPDIR" not in os.environ:
        options["_temp_dir"] = "/tmp/ray"  # noqa: S108 - its own default without TMPDIR
    try:
        with _environment(quiet):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # connection, value and runtime errors, as it comes
        raise ConfigurationError(
            f"no Ray cluster at {address!r}: {cause(error)}; start one with `ray start --head`, "
            "set its RAY_AUTH_TOKEN if it has one, or give --ray local"
        ) from error
    finally:
        # Ray changes SIGTERM, which here stops a build like Ctrl-C.
        with contextlib.suppress(ValueError):  # not in the main thread: it has changed nothing
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Have environment variables set unless they are, for a while."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
