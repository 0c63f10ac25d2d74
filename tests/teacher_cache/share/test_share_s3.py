"""Push, pull and list against a real S3 server, through a relay that counts and cuts."""

from pathlib import Path

import pytest

from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.share.place import list_caches
from duet_unlearn.teacher_cache.share.store_errors import explain, is_passing
from duet_unlearn.teacher_cache.share.transfer import pull, push
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


def test_an_interrupted_push_shows_no_cache_and_resumes(
    bucket, shared_cache: Path, tmp_path: Path
) -> None:
    url = f"{bucket.url}/cache"
    for name in sorted(shards(shared_cache))[:3]:
        bucket.put(f"cache/shards/{name}", shards(shared_cache)[name])
    with pytest.raises(CacheError, match=r"unfinished, no manifest.json"):
        pull(url, tmp_path / "here")
    bucket.proxy.forget()
    assert push(shared_cache, url).moved_shards == 2
    assert len(bucket.proxy.of("PUT", ".parquet")) == 2


def test_files_of_others_in_the_bucket_are_never_replaced(bucket, shared_cache: Path) -> None:
    url = f"{bucket.url}/cache"
    for name, content in {
        "README.md": b"mine",
        "data.csv": b"1,2",
        f"shards/{NAME}": bytes(len(shards(shared_cache)[NAME])),  # only the content tells
        "shards/other.parquet": b"x",
    }.items():
        bucket.put(f"cache/{name}", content)
        bucket.proxy.forget()
        with pytest.raises(MismatchError, match=f"holds '{name}', which is not of this cache"):
            push(shared_cache, url)
        assert bucket.proxy.of("PUT") == []
        bucket.delete(f"cache/{name}")


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
    with pytest.raises(CacheError, match="no connection .*check the URL and the network"):
        pull(f"{bucket.url}/x", tmp_path / "here")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(CacheError, match="no credentials .*AWS_PROFILE"):
        pull(f"{bucket.url}/x", tmp_path / "here")


@pytest.mark.parametrize("name", ["ConnectTimeoutError", "ReadTimeoutError"])
def test_a_server_that_keeps_silent_is_no_connection(name: str) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    error = getattr(exceptions, name)(endpoint_url="http://store.example")
    assert is_passing(error)
    assert "no connection (" in str(explain(error, "s3://bucket/cache"))
