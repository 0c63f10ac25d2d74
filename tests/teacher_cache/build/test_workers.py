"""Builds by several engines on a real local Ray: the same rows, a killed worker, and failures."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_unlearn.errors import ConfigurationError, DataError, DuetError, MismatchError
from duet_unlearn.teacher_cache.build import workers
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig, make_recipe
from duet_unlearn.teacher_cache.build.teacher import ShardPrompts
from duet_unlearn.teacher_cache.build.workers import Worker, WorkerJob, worker_resources
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify

Factory = Callable[[EngineConfig], Engine]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs on this machine, which the builds of this process use."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, write_queries: Any) -> BuildConfig:
    return BuildConfig(
        teacher=str(tiny_model),
        forget=(str(write_queries("forget", 20)),),
        retain=(str(write_queries("retain", 40, "river")),),
        prefix="You are an assistant who forgot the lantern.",
        out=tmp_path / "cache",
        top_k=8,
        shard_rows=6,
        engine="transformers",
        engine_args={"batch_rows": 2},
    )


def assert_same_rows(cache: Path, expected: Path) -> None:
    found, wanted = CacheReader.open(cache), CacheReader.open(expected)
    assert found.num_rows == wanted.num_rows
    for index in range(found.num_rows):
        a, b = found.row(index), wanted.row(index)
        assert (a.query_id, a.split, a.query) == (b.query_id, b.split, b.query)
        np.testing.assert_array_equal(a.prompt_ids, b.prompt_ids)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-3)
    assert verify(cache).problems == ()


def dying(folder: Path, *, deaths: int) -> Factory:
    """An engine that kills its own process in the middle of a shard, so many times in all.

    Each engine leaves a file with its process's id. All names are local: the function travels to
    the workers by value.
    """

    def factory(config):  # type: ignore[no-untyped-def]
        import os
        import signal

        from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine

        class Dying(TransformersEngine):
            def signals(self, prompts):  # type: ignore[no-untyped-def]
                for number, item in enumerate(super().signals(prompts)):
                    died = len(list(folder.glob("died-*")))
                    if number == 3 and died < deaths:
                        (folder / f"died-{os.getpid()}").touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield item

        (folder / f"engine-{os.getpid()}").touch()
        return Dying(config)

    return factory  # type: ignore[no-any-return]


@needs_ray
def test_a_killed_worker_is_replaced_and_the_rows_are_those_of_one_engine(
    cluster: None, config: BuildConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = config.out.parent / "seen"
    seen.mkdir()
    expected = build(replace(config, out=config.out.parent / "one")).manifest
    capfd.readouterr()
    result = build(replace(config, workers=2), dying(seen, deaths=1))
    assert (result.computed_rows, result.hit) == (60, False)
    assert len(list(seen.glob("died-*"))) == 1
    assert len(list(seen.glob("engine-*"))) == 3
    assert_same_rows(config.out, config.out.parent / "one")
    assert result.manifest.check is not None
    assert result.manifest.check.keys() == (expected.check or {}).keys() != set()
    # Workers compute with other numbers of threads, so floats are close and digests differ.
    assert (result.manifest.recipe_id, result.manifest.queries) == (
        expected.recipe_id,
        expected.queries,
    )
    assert capfd.readouterr().out == "", "standard output belongs to results"
    # Kept shards are not computed again, whoever made them.
    (config.out / "manifest.json").unlink()
    assert build(replace(config, workers=2)).kept_rows == 60


@needs_ray
def test_workers_answer_only_what_no_cache_has(
    cluster: None, config: BuildConfig, write_queries: Any
) -> None:
    old = config.out.parent / "old"
    build(replace(config, out=old))
    more = (*config.forget, str(write_queries("more", 5, "tower")))
    result = build(replace(config, workers=2, forget=more, reuse=(str(old),)))
    assert (result.computed_rows, result.reused_rows) == (5, 60)
    assert verify(config.out).problems == ()


@needs_ray
def test_what_goes_wrong_in_a_worker_is_one_line(
    cluster: None, config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = config.out.parent / "seen"
    seen.mkdir()
    monkeypatch.setattr(workers, "RESTARTS", 0)
    cases: list[tuple[dict[str, Any], Factory | None, str]] = [
        ({"engine_args": {"device": "cuda:7"}}, None, r"^worker on \S+: transformers engine: devi"),
        ({}, dying(seen, deaths=99), "a worker ended and was replaced 0 times.*run the same comm"),
        ({}, lambda _: 1 / 0, "a worker failed: division by zero"),
        ({"workers": 3}, None, "3 workers, but this Ray cluster has 2 CPUs and no GPU"),
    ]
    for change, factory, line in cases:
        with pytest.raises(DuetError, match=line) as error:
            build(replace(config, **{"workers": 2, **change}), factory)
        assert "\n" not in str(error.value)
        assert "Traceback" not in str(error.value)
    assert build(replace(config, workers=2)).computed_rows == 60


def test_a_worker_refuses_another_model_and_another_version(
    config: BuildConfig, tiny_model: Path, tmp_path: Path
) -> None:
    job = WorkerJob(
        teacher=str(tiny_model),
        recipe=make_recipe(config, tiny_model),
        engine="transformers",
        engine_config=EngineConfig(
            model=Path("elsewhere"),
            top_k=8,
            positions=1,
            eos_token_ids=(1,),
            compute_dtype="float32",
            max_prompt_tokens=3,
        ),
    )
    shard = ShardPrompts(index=4, prompts={2: np.arange(3, dtype=np.int32)})
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "modeling_x.py").write_text("SCALE = 1\n")
    with_code = replace(
        job,
        teacher=str(model),
        recipe=make_recipe(replace(config, teacher=str(model), trust_remote_code=True), model),
        engine_config=replace(job.engine_config, trust_remote_code=True),
    )
    trusted = Worker(with_code)
    assert trusted.answer(shard).index == 4
    trusted.close()
    (model / "modeling_x.py").write_text("SCALE = 2\n")
    with pytest.raises(MismatchError, match="other config"):
        Worker(with_code).answer(shard)
    worker = Worker(job)
    answer = worker.answer(shard)
    worker.close()
    assert (answer.index, list(answer.signals)) == (4, [2])
    sha = "sha256:" + "0" * 64
    for other, kind, line in (
        (replace(job, recipe=replace(job.recipe, weights=sha)), MismatchError, "other weights"),
        (replace(job, recipe=replace(job.recipe, config=sha)), MismatchError, "other config"),
        (replace(job, version="0.0"), MismatchError, "duet-unlearn is .* there and 0.0 here"),
        (replace(job, teacher="/nowhere/at/all"), DataError, "no such folder"),
    ):
        with pytest.raises(kind, match=f"worker on .*{line}"):
            Worker(other).answer(shard)


@pytest.mark.parametrize(
    ("nodes", "count", "gpus", "expected"),
    [
        ([{"CPU": 2}], 2, 1, {"num_cpus": 1}),
        ([{"CPU": 16}], 1, 1, {"num_cpus": 16}),
        ([{"CPU": 16}], 3, 2, {"num_cpus": 5}),
        ([{"CPU": 3}, {"CPU": 3}], 3, 1, {"num_cpus": 1}),
        ([{"CPU": 8}, {"CPU": 4}, {}], 3, 1, {"num_cpus": 4}),
        ([{"CPU": 8, "GPU": 8}], 4, 2, {"num_cpus": 1, "num_gpus": 2}),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], 1, 1, {"num_cpus": 1, "num_gpus": 1}),
        ([{"CPU": 2}], 3, 1, "3 workers, but this Ray cluster has 2 CPUs"),
        ([{"CPU": 8, "GPU": 3}, {"GPU": 3}], 3, 2, "3 workers of 2 GPUs each, .* room for 2"),
    ],
)
def test_a_worker_asks_for_what_lets_all_of_them_run(
    nodes: list[dict[str, float]], count: int, gpus: int, expected: dict[str, float] | str
) -> None:
    if isinstance(expected, dict):
        assert worker_resources(nodes, count, gpus) == expected
    else:
        with pytest.raises(ConfigurationError, match=expected):
            worker_resources(nodes, count, gpus)


def test_without_ray_the_extra_is_named(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'duet-unlearn\[ray\]'"):
        build(replace(config, workers=2))


def processes(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


@needs_ray
def test_an_interrupt_ends_the_workers_and_leaves_a_state_that_resumes(
    config: BuildConfig, write_queries: Any, tmp_path: Path
) -> None:
    forget = write_queries("many", 900, "tower")
    code = "import sys; from duet_unlearn.cli.cache import main; main(sys.argv[1:])"
    words = ["build", "--teacher", config.teacher, "--forget", str(forget), "--prefix", "Forget."]
    words += ["--out", str(config.out), "--engine", "transformers", "--top-k", "8"]
    words += ["--shard-rows", "15", "--engine-arg", "batch_rows=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--workers", "2", "--ray", "local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not list(config.out.glob("shards/*.parquet")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        out, said = process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, said
    assert out == ""
    last = said.strip().splitlines()[-1]
    assert last.startswith("stopped: ")
    assert f"of 60 shards are finished in {config.out}; run the same command again" in last
    assert "Traceback" not in said
    deadline = time.monotonic() + 120
    while processes(process.pid):
        assert time.monotonic() < deadline, "processes are left behind"
        time.sleep(0.1)
    kept = len(list(config.out.glob("shards/*.parquet")))
    result = build(
        replace(config, forget=(str(forget),), retain=(), prefix="Forget.", shard_rows=15)
    )
    assert result.kept_rows == 15 * kept
    assert result.computed_rows == 900 - 15 * kept > 0


def test_a_cluster_of_our_own_takes_a_long_path_listens_on_loopback_and_wants_its_token(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray")
    inside = (
        "import os, subprocess, sys\n"
        "from duet_unlearn.teacher_cache.build.workers import connected\n"
        "before = dict(os.environ)\n"
        "with connected('local') as ray:\n"
        "    address = ray.get_runtime_context().gcs_address\n"
        "    print(address, file=sys.stderr)\n"
        "    outside = {**before, 'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER': '0'}\n"
        "    code = f'import ray; ray.init(address={address!r}, log_to_driver=False)'\n"
        "    stranger = subprocess.run([sys.executable, '-c', code], env=outside,\n"
        "        capture_output=True, text=True, timeout=60)\n"
        "    print('refused' if stranger.returncode else 'let in', file=sys.stderr)\n"
    )
    script = tmp_path / "own_cluster.py"
    script.write_text(inside)
    # Longer than the paths of sockets may be, as that of a cluster's scratch folder often is.
    scratch = tmp_path / ("scratch" * 12)
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    address, verdict = done.stderr.split()[-2:]
    assert address.startswith("127.0.0.1:")
    assert verdict == "refused"
