"""Push, pull and list against a real S3 server, through a relay that counts and cuts."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.share.listing import list_caches
from duet_unlearn.teacher_cache.share.share import pull, push
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.teacher_cache.verify import verify

NAME = "00002-of-00005.parquet"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "shards").glob("*.parquet")}


def test_a_cache_goes_to_s3_and_back_and_the_manifest_goes_last(
    bucket, shared_cache: Path, tmp_path: Path
) -> None:
    url = f"{bucket.url}/team/cache"
    push(shared_cache, url)
    puts = bucket.proxy.of("PUT")
    assert len(puts) == 7
    assert [put.rpartition("/")[2] for put in puts[-2:]] == ["README.md", "manifest.json"]
    pull(url, tmp_path / "here")
    assert shards(tmp_path / "here") == shards(shared_cache)
    assert verify(tmp_path / "here").problems == ()
    (found,) = list_caches(bucket.url)
    assert found.name == "team/cache"


def test_a_second_push_moves_nothing(bucket, shared_cache: Path, tmp_path: Path) -> None:
    url = f"{bucket.url}/cache"
    push(shared_cache, url)
    bucket.proxy.forget()
    assert push(shared_cache, url).hit
    assert bucket.proxy.of("PUT") == []
    assert bucket.proxy.of("GET", ".parquet") == []
    assert bucket.proxy.up < 10_000 < min(map(len, shards(shared_cache).values()))


def test_an_interrupted_push_shows_no_cache_and_goes_on_without_reading_back(
    bucket, shared_cache: Path, tmp_path: Path
) -> None:
    url = f"{bucket.url}/cache"
    push(shared_cache, f"{bucket.url}/elsewhere")
    for name in sorted(shards(shared_cache))[:3]:
        bucket.put(f"cache/shards/{name}", shards(shared_cache)[name])
    with pytest.raises(CacheError, match=r"unfinished, no manifest.json"):
        pull(url, tmp_path / "here")
    bucket.proxy.forget()
    assert push(shared_cache, url).moved_shards == 2
    # The ETag tells what is there.
    assert bucket.proxy.of("GET", ".parquet") == []
    assert len(bucket.proxy.of("PUT", ".parquet")) == 2


def test_what_lies_there_with_the_right_size_and_wrong_bytes_is_replaced(
    bucket, shared_cache: Path, tmp_path: Path
) -> None:
    url = f"{bucket.url}/cache"
    wrong = bytearray(shards(shared_cache)[NAME])
    wrong[-300] ^= 1
    bucket.put(f"cache/shards/{NAME}", bytes(wrong))
    push(shared_cache, url)
    pull(url, tmp_path / "here")
    assert shards(tmp_path / "here") == shards(shared_cache)


def test_connections_that_are_cut_while_sending_are_taken_up_again(
    bucket, shared_cache: Path, tmp_path: Path
) -> None:
    url = f"{bucket.url}/cache"
    bucket.proxy.cuts_up[:] = [9000, 15000, 700]
    push(shared_cache, url)
    assert bucket.proxy.cuts_up == []
    pull(url, tmp_path / "here")
    assert shards(tmp_path / "here") == shards(shared_cache)


def test_a_push_that_fails_for_good_leaves_no_manifest(bucket, shared_cache: Path) -> None:
    url = f"{bucket.url}/cache"
    bucket.proxy.most_shards = 2
    with pytest.raises(CacheError, match="no connection .*run the same command again"):
        push(shared_cache, url)
    there = bucket.keys()
    assert len(there) == 2
    assert all(key.endswith(".parquet") for key in there)
    bucket.proxy.most_shards = None
    bucket.proxy.forget()
    assert push(shared_cache, url).moved_shards == 3
    assert len(bucket.proxy.of("PUT", ".parquet")) == 3
    assert len(bucket.keys()) == 7


def test_connections_that_are_cut_while_fetching_are_taken_up_again(
    bucket, shared_cache: Path, tmp_path: Path
) -> None:
    url = f"{bucket.url}/cache"
    push(shared_cache, url)
    bucket.proxy.cuts_down[:] = [500, 9000, 12000, 3000]
    pull(url, tmp_path / "here")
    assert bucket.proxy.cuts_down == []
    assert shards(tmp_path / "here") == shards(shared_cache)


def test_changed_bytes_in_the_bucket_are_refused(
    bucket, shared_cache: Path, tmp_path: Path, cache_home: Path
) -> None:
    url = f"{bucket.url}/cache"
    push(shared_cache, url)
    wrong = bytearray(shards(shared_cache)[NAME])
    wrong[3000] ^= 1
    bucket.put(f"cache/shards/{NAME}", bytes(wrong))
    bucket.put("cache/shards/more.parquet", b"x")
    with pytest.raises(CorruptCacheError, match=f"{NAME}: its bytes have"):
        pull(url, tmp_path / "here")
    problems = verify(url).problems
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{url}/shards/more.parquet",
        f"{url}/shards/{NAME}",
    ]


def test_another_cache_is_refused_with_what_differs(
    bucket, shared_cache: Path, make_cache, tmp_path: Path
) -> None:
    url = f"{bucket.url}/cache"
    push(shared_cache, url)
    before = bucket.keys()
    with pytest.raises(MismatchError, match='prefix: "Forget." / "Other."'):
        push(make_cache(tmp_path / "other", prefix="Other."), url)
    assert bucket.keys() == before


def test_rows_are_read_straight_from_s3(bucket, shared_cache: Path, cache_home: Path) -> None:
    url = f"{bucket.url}/cache"
    push(shared_cache, url)
    reader, local = CacheReader.open(url), CacheReader.open(shared_cache)
    for index in (0, 57, 199):
        assert reader.row(index).query == local.row(index).query
        assert (reader.row(index).logits == local.row(index).logits).all()


def test_a_file_of_several_parts_is_known_again_by_its_etag(bucket, tmp_path: Path) -> None:
    # s3fs sends in parts of 50 MiB what has 100 MiB and more.
    path = tmp_path / "large"
    piece = np.random.default_rng(0).bytes(1 << 20)
    path.write_bytes(piece * 101)
    with path.open("rb") as file:
        sha256 = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    store = Store(bucket.url)
    store.put_file(path, "large", sha256)
    assert len(bucket.proxy.of("PUT", "/large")) == 3
    bucket.proxy.forget()
    assert store.has(path, "large", store.list()["large"], sha256)
    assert bucket.proxy.of("GET", "/large") == []
    with path.open("r+b") as file:
        file.write(b"?")
    assert not store.has(path, "large", store.list()["large"], "sha256:" + "0" * 64)


def test_errors_of_s3_are_one_line(
    bucket, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (
        lambda: push(shared_cache, "s3://no-such-bucket-here/x"),
        lambda: pull("s3://no-such-bucket-here/x", tmp_path / "here"),
        lambda: list_caches("s3://no-such-bucket-here"),
    ):
        with pytest.raises(CacheError, match="no such bucket; create it first"):
            call()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CacheError, match="no connection .*check the address"):
        pull(f"{bucket.url}/x", tmp_path / "here")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(CacheError, match="no credentials .*AWS_PROFILE"):
        pull(f"{bucket.url}/x", tmp_path / "here")
