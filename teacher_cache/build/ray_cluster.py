"""A connection to a Ray cluster that leaves this process as it was, and what to ask it for."""

import contextlib
import io
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.engines.base import cause

logger = logging.getLogger(__name__)

MISSING = (
    "--workers needs Ray, which is not installed: pip install 'duet-unlearn[ray]', or build in "
    "parts with --shards I/N"
)


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
        stack.enter_context(contextlib.redirect_stdout(_Log()))
        if not ray.is_initialized():
            local = {"include_dashboard": False}
            options = local if address == "local" else {}
            # Ray makes workers nice: beside other work on this machine they would get nothing.
            quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
            with _environment(quiet), _same_signal_handlers():
                try:
                    ray.init(
                        address=address,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        **options,
                    )
                except Exception as error:  # connection, value and runtime errors, as it comes
                    raise ConfigurationError(
                        f"no Ray cluster at {address!r}: {cause(error)}; start one with `ray start "
                        "--head`, set its RAY_AUTH_TOKEN if it has one, or give --ray local"
                    ) from error
            stack.callback(ray.shutdown)
        yield ray


class _Log(io.TextIOBase):
    """Takes what is printed as debug messages."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("ray: %s", text.rstrip())
        return len(text)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: os.environ.get(name, value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _same_signal_handlers() -> Iterator[None]:
    """Undo what Ray does to SIGTERM: here it stops a build like Ctrl-C."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread: it has changed nothing
            signal.signal(signal.SIGTERM, handler)
