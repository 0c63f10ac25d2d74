"""Read a cache straight from a URL: what is fetched when, what is kept, what is checked."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError
from duet_unlearn.teacher_cache.format.manifest import read_manifest
from duet_unlearn.teacher_cache.inspect import summarize
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.share import remote
from duet_unlearn.teacher_cache.share.remote import kept_folder

pytestmark = pytest.mark.usefixtures("cache_home")


def shard(index: int) -> str:
    return f"/shards/0000{index}-of-00005.parquet"


def wait_for_fetches() -> None:
    for thread in threading.enumerate():
        if thread.name == "duet-fetch":
            thread.join(60)


def test_inspect_fetches_the_manifest_alone(web, shared_cache: Path) -> None:
    here, there = summarize(shared_cache), summarize(web.url)
    assert {**there, "cache": ""} == {**here, "cache": ""}
    assert web.requests == ["/manifest.json"]


def test_rows_are_those_of_the_local_cache(web, shared_cache: Path) -> None:
    local, remote = CacheReader.open(shared_cache), CacheReader.open(web.url)
    assert (remote.splits == local.splits).all()
    assert remote.row_groups == local.row_groups
    for index in range(0, 200, 7):
        one, two = local.row(index), remote.row(index)
        assert (one.query_id, one.split, one.query) == (two.query_id, two.split, two.query)
        assert (one.logits == two.logits).all()
        assert (one.token_ids == two.token_ids).all()
    wait_for_fetches()
    assert sorted(web.shard_requests()) == [shard(i) for i in range(5)]


def test_a_row_fetches_its_shard_and_one_ahead(web) -> None:
    reader = CacheReader.open(web.url)
    reader.row(41)
    wait_for_fetches()
    assert web.shard_requests() == [shard(1), shard(2)]
    reader.row(199)
    wait_for_fetches()
    assert web.shard_requests() == [shard(i) for i in (1, 2, 4, 0)]
    for index in range(200):
        reader.row(index)
    wait_for_fetches()
    assert len(web.shard_requests()) == 5


def test_a_shard_that_is_needed_now_does_not_wait_for_the_one_ahead(web) -> None:
    web.hold = threading.Event()
    web.cuts[shard(2)] = [100]  # the answer stands still until the test lets it go
    reader = CacheReader.open(web.url)
    assert reader.row(41).query_id == "q0041"
    assert reader.row(199).query_id == "q0199"
    web.hold.set()
    assert reader.row(80).query_id == "q0080"
    wait_for_fetches()


def read_all(reader: CacheReader) -> CacheReader:
    for index in range(0, 200, 40):
        reader.row(index)
    wait_for_fetches()
    return reader


def test_the_next_run_fetches_nothing_but_the_manifest(web) -> None:
    read_all(CacheReader.open(web.url))
    web.requests.clear()
    read_all(CacheReader.open(web.url))
    assert web.requests == ["/manifest.json"]


def test_a_pinned_cache_that_is_all_here_needs_no_server(web, shared_cache: Path) -> None:
    pinned = f"{web.url}@{read_manifest(shared_cache).digest}"
    read_all(CacheReader.open(pinned))
    web.requests.clear()
    read_all(CacheReader.open(pinned))
    assert web.requests == []


def test_a_kept_shard_that_was_damaged_is_fetched_again(
    web, shared_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = read_manifest(shared_cache).digest
    read_all(CacheReader.open(web.url))
    kept = kept_folder(digest) / shard(2).lstrip("/")
    data = bytearray(kept.read_bytes())
    data[3000] ^= 1
    kept.write_bytes(data)
    web.requests.clear()
    assert CacheReader.open(f"{web.url}@{digest}").row(80).query_id == "q0080"
    wait_for_fetches()
    assert web.requests == [shard(2)]
    assert "00002-of-00005.parquet: damaged; fetching it again" in caplog.text
    assert kept.read_bytes() == (shared_cache / shard(2).lstrip("/")).read_bytes()


def test_wrong_bytes_are_never_read(web, shared_cache: Path) -> None:
    lie = bytearray((shared_cache / shard(1).lstrip("/")).read_bytes())
    lie[3000] ^= 1
    web.answers[shard(1)] = [bytes(lie)]
    reader = CacheReader.open(web.url)
    assert reader.row(0).query_id == "q0000"
    with pytest.raises(CorruptCacheError, match=r"00001-of-00005.parquet: its bytes have"):
        reader.row(40)
    assert reader.row(199).query_id == "q0199"


def test_what_failed_ahead_is_tried_again_when_it_is_needed(web, shared_cache: Path) -> None:
    web.answers[shard(3)] = [500] * 5 + [(shared_cache / shard(3).lstrip("/")).read_bytes()]
    reader = CacheReader.open(web.url)
    reader.row(80)
    wait_for_fetches()
    assert reader.row(130).query_id == "q0130"
    wait_for_fetches()
    assert web.requests.count(shard(3)) == 6


def test_a_server_that_stays_away_gives_one_line(web) -> None:
    reader = CacheReader.open(web.url)
    web.answers[shard(0)] = [503]
    with pytest.raises(CacheError, match=r"00000-of-00005.parquet: the server answers 503"):
        reader.row(0)
    wait_for_fetches()


def test_two_readers_share_what_they_fetch(web) -> None:
    readers = [CacheReader.open(web.url) for _ in range(2)]
    threads = [threading.Thread(target=read_all, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(web.shard_requests()) == [shard(i) for i in range(5)]


def test_a_pin_is_held(web) -> None:
    with pytest.raises(MismatchError, match="expected sha256:0000"):
        CacheReader.open(f"{web.url}@sha256:{'0' * 64}")


def test_a_process_that_ends_early_does_not_wait_and_says_nothing(web) -> None:
    script = (
        "import sys\n"
        "from duet_unlearn.teacher_cache.reader import CacheReader\n"
        "print(CacheReader.open(sys.argv[1]).row(0).query_id)\n"
    )
    web.hold = threading.Event()
    web.cuts[shard(1)] = [100]  # the one ahead
    result = subprocess.run(
        [sys.executable, "-c", script, web.url], capture_output=True, text=True, timeout=120
    )
    web.hold.set()
    assert (result.returncode, result.stdout, result.stderr) == (0, "q0000\n", "")


def test_a_shard_that_is_refused_does_not_stay(web, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise CorruptCacheError("bad rows")

    monkeypatch.setattr(remote, "ensure_sound", refuse)
    with remote.open_afresh(web.url) as shards:
        for entry in shards.manifest.shards:
            with pytest.raises(CorruptCacheError, match="bad rows"), shards.for_a_while(entry):
                pass
            assert not list(shards.folder.rglob("*.parquet"))
