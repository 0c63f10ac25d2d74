"""Pull and list from a real HTTP server that cuts connections, lies, or never ends."""

import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch.utils.data import DataLoader, Subset

from duet_unlearn import open_cache
from duet_unlearn.cli.cache import main
from duet_unlearn.errors import CacheError, CorruptCacheError, MismatchError, OutputError
from duet_unlearn.teacher_cache.format.manifest import read_manifest
from duet_unlearn.teacher_cache.share.place import list_caches
from duet_unlearn.teacher_cache.share.transfer import pull
from duet_unlearn.teacher_cache.verify import verify

NAME = "00002-of-00005.parquet"
SHARD = f"/shards/{NAME}"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "shards").glob("*.parquet")}


def test_a_cache_is_pulled_from_its_manifest_alone(web, shared_cache: Path, tmp_path: Path) -> None:
    result = pull(web.url, tmp_path / "here")
    assert result.moved_shards == 5
    assert verify(tmp_path / "here").problems == ()
    assert len(web.requests) == 6  # no listing, no HEAD
    assert pull(f"{web.url}/@{result.manifest.digest}", tmp_path / "here").hit
    assert len(web.shard_requests()) == 5


def test_a_shard_whose_connection_was_cut_is_fetched_again(
    web, shared_cache: Path, tmp_path: Path
) -> None:
    size = len(shards(shared_cache)[NAME])
    web.cuts[SHARD] = [size // 2, size // 4, 0]
    pull(web.url, tmp_path / "here")
    assert shards(tmp_path / "here") == shards(shared_cache)
    assert web.requests.count(SHARD) == 4


def test_a_stopped_pull_keeps_what_is_finished_and_goes_on(
    web, shared_cache: Path, tmp_path: Path
) -> None:
    web.answers[SHARD] = [503]
    with pytest.raises(CacheError, match=r"00002-of-00005.parquet: the server answers 503.*again"):
        pull(web.url, tmp_path / "here")
    assert web.requests.count(SHARD) == 5
    assert not (tmp_path / "here/manifest.json").exists()
    before = shards(tmp_path / "here")
    assert NAME not in before
    del web.answers[SHARD]
    web.requests.clear()
    result = pull(web.url, tmp_path / "here")
    assert result.moved_shards == 5 - len(before)
    assert len(web.shard_requests()) == 5 - len(before)
    assert shards(tmp_path / "here") == shards(shared_cache)


def test_a_lying_server_is_refused_and_its_bytes_never_get_a_name(
    web, shared_cache: Path, tmp_path: Path
) -> None:
    lie = bytearray(shards(shared_cache)[NAME])
    lie[3000] ^= 1
    web.answers[SHARD] = [bytes(lie)]
    with pytest.raises(CorruptCacheError, match=f"{NAME}: its bytes have sha256:"):
        pull(web.url, tmp_path / "here")
    assert web.requests.count(SHARD) == 2
    assert NAME not in {path.name for path in (tmp_path / "here/shards").iterdir()}
    assert not (tmp_path / "here/manifest.json").exists()


def test_wrong_bytes_once_are_fetched_again(web, shared_cache: Path, tmp_path: Path) -> None:
    right = shards(shared_cache)[NAME]
    web.answers[SHARD] = [right[:-5], right]
    pull(web.url, tmp_path / "here")
    assert shards(tmp_path / "here") == shards(shared_cache)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda right: right + b"more", "more than"),
        (lambda right: right[:-5], "bytes, the manifest says"),
        (lambda _: 404, "the manifest lists it, but it is not there"),
        (lambda _: 403, r"no permission \(403\)"),
    ],
)
def test_a_shard_that_is_not_the_shard_is_refused(
    web, shared_cache: Path, tmp_path: Path, answer, message: str
) -> None:
    web.answers[SHARD] = [answer(shards(shared_cache)[NAME])]
    with pytest.raises(CacheError, match=f"{NAME}: .*{message}"):
        pull(web.url, tmp_path / "here")


def test_answers_that_never_end_are_left(web, tmp_path: Path) -> None:
    web.endless.add(SHARD)
    with pytest.raises(CorruptCacheError, match=f"{NAME}: more than"):
        pull(web.url, tmp_path / "here")
    web.endless.add("/manifest.json")
    with pytest.raises(CorruptCacheError, match="manifest.json: more than 16777216 bytes"):
        pull(web.url, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (404, "no teacher cache there, no manifest.json; check the URL"),
        (401, r"no permission \(401\); check the credentials"),
        (418, "the server answers 418; check the URL"),
        (b"<html>", "not readable as JSON"),
    ],
)
def test_a_manifest_that_is_none_gives_one_line(
    web, tmp_path: Path, answer: bytes | int, message: str
) -> None:
    web.answers["/manifest.json"] = [answer]
    with pytest.raises(CacheError, match=message) as error:
        pull(web.url, tmp_path / "here")
    assert "\n" not in str(error.value)
    assert len(web.requests) == 1


def test_nobody_listening_gives_one_line(web, tmp_path: Path) -> None:
    with pytest.raises(
        CacheError, match=r"127\.0\.0\.1:9.*no connection .*check the URL and the network"
    ):
        pull("http://127.0.0.1:9/cache", tmp_path / "here")


def test_a_full_disk_is_told_from_a_bad_network(web, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write: a limit on file sizes is in force"):
            pull(web.url, tmp_path / "here")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pull(web.url, tmp_path / "here").moved_shards == 5


def test_a_password_is_used_and_never_shown(web, tmp_path: Path) -> None:
    with pytest.raises(CacheError) as error:
        pull("http://me:secret@127.0.0.1:9/cache", tmp_path / "here")
    assert "secret" not in str(error.value)
    web.folder = tmp_path  # nothing there
    with pytest.raises(CacheError) as error:
        pull(web.url.replace("://", "://me:secret@"), tmp_path / "here")
    assert "secret" not in str(error.value)
    assert web.authorizations == ["Basic bWU6c2VjcmV0"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{url}"),
        ("verify", "{url}"),
        ("inspect", "{url}", "--json"),
        ("verify", "{url}", "--json"),
        ("diff", "{url}", "{url}"),
        ("list", "{url}", "--json"),
        ("pull", "{url}", "{out}/here"),
        ("pull", "{url}/nowhere", "{out}/here"),
        ("pull", "{url}?sig=s3cr3t", "{out}/here"),
    ],
)
def test_a_password_is_neither_shown_nor_kept(
    arguments: tuple[str, ...], web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUET_CACHE_HOME", str(tmp_path / "home"))
    url = web.url.replace("://", "://alice:s3cr3t@")
    result = CliRunner().invoke(
        main, ["--verbose", *(a.format(url=url, out=tmp_path) for a in arguments)]
    )
    assert "127.0.0.1" in result.output or "here" in result.output
    for text in (result.output, *kept_texts(tmp_path)):
        assert "s3cr3t" not in text
        assert "alice" not in text


def kept_texts(folder: Path) -> list[str]:
    return [p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()]


def test_list_reads_one_cache_and_says_why_it_cannot_list_more(web, shared_cache: Path) -> None:
    (found,) = list_caches(web.url)
    assert found.manifest == read_manifest(shared_cache)
    with pytest.raises(CacheError, match="http:// has no listing.*give the URL of one cache"):
        list_caches(f"{web.url}/shards")


def test_verify_reads_every_byte_there_and_names_each_bad_shard(
    web, shared_cache: Path, cache_home: Path
) -> None:
    assert verify(web.url).problems == ()
    lie = bytearray(shards(shared_cache)[NAME])
    lie[3000] ^= 1
    web.answers[SHARD] = [bytes(lie)]
    web.answers["/shards/00004-of-00005.parquet"] = [404]
    one, two = verify(web.url).problems
    assert one.startswith(f"{web.url}{SHARD}: its bytes have")
    assert two.startswith(f"{web.url}/shards/00004-of-00005.parquet: the manifest lists it")
    kept = [path for path in cache_home.rglob("*") if path.is_file()]
    assert [path for path in kept if "verified" not in path.parts] == []  # no copy of a shard
    with pytest.raises(MismatchError, match="expected sha256:000"):
        verify(f"{web.url}@sha256:{'0' * 64}")


def test_an_interrupted_pull_ends_at_once_while_the_network_stands_still(
    web, tmp_path: Path
) -> None:
    web.hold = threading.Event()
    web.cuts[SHARD] = [100]  # and then nothing more
    command = "from duet_unlearn.cli.cache import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", command, "pull", web.url, str(tmp_path / "here")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while len(set(web.shard_requests())) < 5:
                assert process.poll() is None, process.stderr
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=50)
        finally:
            process.kill()
            web.hold.set()
    assert (process.returncode, out) == (130, "")
    assert err == "stopped; run the same command again, it resumes from what is finished\n"
    assert not (tmp_path / "here/manifest.json").exists()
    assert not list((tmp_path / "here").rglob("*.tmp"))
    assert pull(web.url, tmp_path / "here").moved_shards >= 1


def test_a_loaders_processes_do_not_share_a_connection_that_is_open(
    web, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUET_CACHE_HOME", str(tmp_path))
    dataset = open_cache(web.url).torch_dataset()
    assert dataset[0]["query_id"]
    last = len(dataset) - 1  # of a shard that has to be fetched
    loader = DataLoader(Subset(dataset, [last]), batch_size=None, num_workers=1)
    assert [row["query_id"] for row in loader] == [dataset[last]["query_id"]]
