"""`duet-distill run URL`: a student is trained while the cache comes in."""

import json
import threading
import time
from pathlib import Path

import pytest

from duet_unlearn.distill.batches.sampler import epoch_order
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.reader import CacheReader


@pytest.fixture
def cache(tiny_model: Path, write_queries, tmp_path: Path) -> Path:
    """Fifteen shards of two rows."""
    config = BuildConfig(
        teacher=str(tiny_model),
        forget=(str(write_queries("forget", 12)),),
        retain=(str(write_queries("retain", 18, "river")),),
        prefix="You have forgotten the lantern.",
        out=tmp_path / "cache",
        engine="transformers",
        top_k=20,
        shard_rows=2,
    )
    build(config)
    return config.out


def last_shard_needed(reader: CacheReader, seed: int) -> str:
    order = epoch_order(reader.splits, reader.row_groups, seed=seed, epoch=0)
    first: dict[int, int] = {}
    for at, row in enumerate(order):
        first.setdefault(int(row) // 2, at)
    shard = max(first, key=lambda index: first[index])
    assert first[shard] > 8, "the shard has to be needed late"
    return f"/shards/{reader.manifest.shards[shard].name}"


def test_training_begins_before_the_last_shard_is_there_and_gives_the_same_student(
    web, cache: Path, tiny_model: Path, tmp_path: Path, cache_home: Path
) -> None:
    web.folder = cache
    local = CacheReader.open(cache)
    late = last_shard_needed(local, seed=0)
    web.hold = threading.Event()
    web.cuts[late] = [100]
    shared = {"student": str(tiny_model), "batch_size": 2, "epochs": 2, "logging_steps": 1}

    def let_go_after_the_first_step() -> None:
        log = tmp_path / "remote.unfinished" / "duet_log.jsonl"
        while not (log.exists() and log.read_text()):
            time.sleep(0.02)
        web.hold.set()

    watcher = threading.Thread(target=let_go_after_the_first_step, daemon=True)
    watcher.start()
    remote = run(RunConfig(cache=web.url, out=str(tmp_path / "remote"), **shared))
    watcher.join(1)
    assert not watcher.is_alive(), "no step was logged"
    assert web.requests.count(late) == 2
    assert len(set(web.shard_requests())) == 15
    here = run(RunConfig(cache=str(cache), out=str(tmp_path / "here"), **shared))
    assert remote.loss == here.loss
    weights = "model.safetensors"
    assert (tmp_path / "remote" / weights).read_bytes() == (
        tmp_path / "here" / weights
    ).read_bytes()
    run_file = json.loads((tmp_path / "remote" / "duet_run.json").read_text())
    assert run_file["cache"]["digest"] == local.manifest.digest


def test_a_student_tells_no_password_and_no_folder_of_this_machine(
    web, cache: Path, tiny_model: Path, tmp_path: Path, cache_home: Path
) -> None:
    web.folder = cache
    view = tmp_path / "views.txt"
    view.write_text("Say: {query}\n")
    run(
        RunConfig(
            cache=web.url.replace("://", "://alice:s3cr3t@"),
            student=str(tiny_model),
            views=(str(view),),
            out=str(tmp_path / "student"),
            max_steps=1,
        )
    )
    for path in (tmp_path / "student").rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        for secret in ("s3cr3t", "alice", str(tmp_path), str(tiny_model.parent)):
            assert secret.encode() not in text, path
