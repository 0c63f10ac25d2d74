"""Push, pull and list over folders: order, resume, refusals."""

import importlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from duet_unlearn import files as files_module
from duet_unlearn.errors import (
    CacheError,
    ConfigurationError,
    CorruptCacheError,
    DuetError,
    MismatchError,
)
from duet_unlearn.teacher_cache.format.manifest import read_manifest
from duet_unlearn.teacher_cache.share.place import list_caches, parse_location
from duet_unlearn.teacher_cache.share.store import Store
from duet_unlearn.teacher_cache.share.transfer import pull, push
from duet_unlearn.teacher_cache.verify import verify

SHARD = "shards/00001-of-00005.parquet"
DIGEST = "sha256:" + "0" * 64


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def damage(path: Path) -> None:
    """Flip a bit: the size stays, only the content tells."""
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def test_a_cache_goes_to_a_folder_and_back_unchanged(shared_cache: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    sent = push(shared_cache, str(there))
    assert (sent.moved_shards, sent.moved_bytes) == (5, sent.manifest.num_bytes)
    assert files(there) == files(shared_cache)
    pull(str(there), here)
    assert files(here) == files(shared_cache)
    assert verify(str(here)).problems == ()


def test_a_second_push_and_a_second_pull_move_nothing(shared_cache: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    push(shared_cache, f"file://{there}")
    pull(str(there), here)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    assert push(shared_cache, str(there)).hit
    assert pull(str(there), here).hit
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_push_resumes_and_replaces_nothing_that_it_cannot_know(
    shared_cache: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    push(shared_cache, str(there))
    (there / "manifest.json").unlink()
    (there / SHARD).unlink()
    assert push(shared_cache, str(there)).moved_shards == 1
    assert files(there) == files(shared_cache)
    # Without a manifest a shard of another content may be of somebody else's push.
    (there / "manifest.json").unlink()
    damage(there / "shards/00003-of-00005.parquet")
    before = files(there)
    with pytest.raises(MismatchError, match="holds 'shards/00003-of-00005.parquet', which is not"):
        push(shared_cache, str(there))
    assert files(there) == before


def test_a_shard_that_vanished_beside_its_manifest_is_sent_again(
    shared_cache: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    push(shared_cache, str(there))
    (there / SHARD).unlink()
    assert push(shared_cache, str(there)).moved_shards == 1
    assert files(there) == files(shared_cache)


def test_a_checked_push_repairs_a_damaged_shard_of_the_same_size(
    shared_cache: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    push(shared_cache, str(there))
    sound = (there / SHARD).read_bytes()
    damage(there / SHARD)
    assert push(shared_cache, str(there)).hit  # a size is enough beside a manifest
    assert push(shared_cache, str(there), check=True).moved_shards == 1
    assert (there / SHARD).read_bytes() == sound
    assert push(shared_cache, str(there), check=True).hit
    assert verify(there).problems == ()


def test_another_cache_is_never_replaced(shared_cache: Path, make_cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", prefix="Forget all.", seed=1)
    there = tmp_path / "there"
    push(other, str(there))
    before = files(there)
    with pytest.raises(MismatchError) as error:
        push(shared_cache, str(there))
    assert 'prefix: "Forget all." / "Forget."' in str(error.value)
    assert "queries: 200 rows" in str(error.value)
    assert files(there) == before
    with pytest.raises(MismatchError, match="prefix"):
        pull(str(there), shared_cache)


def test_shards_of_another_unfinished_push_are_not_mixed_in(
    shared_cache: Path, make_cache, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    push(make_cache(tmp_path / "other", shards=2), str(there))
    (there / "manifest.json").unlink()
    (there / "README.md").unlink()
    with pytest.raises(
        MismatchError, match="holds 'shards/00000-of-00002.parquet', which is not of this"
    ):
        push(shared_cache, str(there))


def test_a_damaged_cache_is_not_published(cache_copy: Path, tmp_path: Path) -> None:
    damage(cache_copy / SHARD)
    with pytest.raises(CorruptCacheError, match="00001-of-00005.parquet: its bytes have"):
        push(cache_copy, str(tmp_path / "there"))
    assert not (tmp_path / "there" / "manifest.json").exists()


def test_an_unfinished_cache_is_named(cache_copy: Path, tmp_path: Path) -> None:
    (cache_copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match="unfinished, no manifest.json"):
        push(cache_copy, str(tmp_path / "there"))
    with pytest.raises(CacheError, match="unfinished, no manifest.json; push the cache again"):
        pull(str(cache_copy), tmp_path / "here")
    with pytest.raises(CacheError, match="no teacher cache there"):
        pull(str(tmp_path / "nowhere"), tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_pins_are_held_on_both_sides(shared_cache: Path, tmp_path: Path) -> None:
    digest = read_manifest(shared_cache).digest
    push(f"{shared_cache}@{digest}", f"{tmp_path / 'there'}@{digest}")
    pull(f"{tmp_path / 'there'}@{digest}", tmp_path / "here")
    for call in (
        lambda: push(f"{shared_cache}@{DIGEST}", str(tmp_path / "x")),
        lambda: push(shared_cache, f"{tmp_path / 'x'}@{DIGEST}"),
        lambda: pull(f"{tmp_path / 'there'}@{DIGEST}", tmp_path / "x"),
    ):
        with pytest.raises(MismatchError, match=f"expected {DIGEST}"):
            call()
    assert not (tmp_path / "x").exists()


def test_a_pull_repairs_what_is_damaged_and_fetches_no_more(
    shared_cache: Path, cache_copy: Path
) -> None:
    damage(cache_copy / SHARD)
    (cache_copy / "shards/00004-of-00005.parquet").unlink()
    assert pull(str(shared_cache), cache_copy).moved_shards == 2
    assert files(cache_copy) == files(shared_cache)


def test_a_damaged_manifest_in_the_way_of_a_pull_is_told_of(
    shared_cache: Path, tmp_path: Path
) -> None:
    here = Path(shutil.copytree(shared_cache, tmp_path / "here"))
    (here / "manifest.json").write_text("{}")
    with pytest.raises(CorruptCacheError, match=r"move its manifest\.json away"):
        pull(str(shared_cache), here)
    (here / "manifest.json").unlink()
    assert pull(str(shared_cache), here).hit
    assert files(here) == files(shared_cache)


def test_a_pull_leaves_other_folders_alone(shared_cache: Path, make_cache, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "README.md").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        pull(str(shared_cache), home)
    assert files(home) == {"README.md": b"mine"}
    unfinished = make_cache(tmp_path / "unfinished", seed=3)
    (unfinished / "manifest.json").unlink()
    before = files(unfinished)
    with pytest.raises(MismatchError, match="which is not of this cache"):
        pull(str(shared_cache), unfinished)
    assert files(unfinished) == before


def test_the_card_of_a_pulled_cache_is_written_here(shared_cache: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(shared_cache, tmp_path / "there"))
    (there / "README.md").write_text("[click me](http://example.invalid)")
    pull(str(there), tmp_path / "here")
    assert files(tmp_path / "here")["README.md"] == files(shared_cache)["README.md"]


def test_list_finds_caches_at_any_depth_and_names_damaged_ones(
    shared_cache: Path, make_cache, tmp_path: Path
) -> None:
    push(shared_cache, str(tmp_path / "all/team/a"))
    push(make_cache(tmp_path / "b", shards=1), str(tmp_path / "all/b"))
    (tmp_path / "all/broken").mkdir()
    (tmp_path / "all/broken/manifest.json").write_text("{}")
    (tmp_path / "all/other").mkdir()
    (tmp_path / "all/latest").symlink_to(tmp_path / "all/b")
    (tmp_path / "all/loop").symlink_to(tmp_path / "all")
    (tmp_path / "all/up").symlink_to(tmp_path)
    (tmp_path / "all/dead").symlink_to(tmp_path / "gone")
    found = list_caches(str(tmp_path / "all"))
    assert [cache.name for cache in found] == ["b", "broken", "latest", "team/a"]
    b, broken, _, a = found
    assert b.manifest is not None
    assert b.manifest.num_rows == 40
    assert a.manifest == read_manifest(shared_cache)
    assert broken.manifest is None
    assert "not the manifest of a teacher cache" in str(broken.problem)
    assert [cache.name for cache in list_caches(str(shared_cache))] == ["."]
    assert list_caches(str(tmp_path / "nowhere")) == ()
    with pytest.raises(CacheError, match="a digest names one cache"):
        list_caches(f"{tmp_path / 'all/b'}@{b.manifest.digest}")


def test_a_folder_that_cannot_be_listed_hides_no_other(
    shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(shared_cache, str(tmp_path / "all/b"))
    (tmp_path / "all/lost+found").mkdir()
    listed = Store.list

    def refuse(self: Store, folder: str) -> dict[str, int | None]:
        if folder == "lost+found":
            raise CacheError("no permission") from cause
        return listed(self, folder)

    monkeypatch.setattr(Store, "list", refuse)
    cause: OSError = PermissionError()
    assert [cache.name for cache in list_caches(str(tmp_path / "all"))] == ["b"]
    cause = ConnectionError()
    with pytest.raises(CacheError, match="no permission"):
        list_caches(str(tmp_path / "all"))


def test_a_manifest_that_lies_about_names_is_refused(shared_cache: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(shared_cache, tmp_path / "there"))
    value = json.loads((there / "manifest.json").read_text())
    value["shards"][0]["name"] = "../../escape.parquet"
    (there / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(CorruptCacheError, match="edited or damaged"):
        pull(str(there), tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_through_memory_as_through_any_other_store(shared_cache: Path, tmp_path: Path) -> None:
    url = f"memory://caches/{tmp_path.name}"
    assert push(shared_cache, url).moved_shards == 5
    assert push(shared_cache, url).hit
    assert [cache.name for cache in list_caches("memory://caches")] == [tmp_path.name]
    pull(url, tmp_path / "here")
    assert files(tmp_path / "here") == files(shared_cache)


def test_places_are_taken_apart() -> None:
    assert parse_location(f"s3://bucket/a/@{DIGEST}") == ("s3://bucket/a", DIGEST)
    assert parse_location("hf://datasets/o/n@main/a") == ("hf://datasets/o/n@main/a", None)
    assert parse_location(f"folder/a@{DIGEST}") == ("folder/a", DIGEST)
    assert parse_location("http://[::1]:80/a") == ("http://[::1]:80/a", None)


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("nothing://x/y", ConfigurationError, "unknown protocol nothing://"),
        ("https://host/a?b=c", CacheError, "without a query"),
        ("s3://a::memory://b", CacheError, "chained URLs"),
        ("s3://a/b@sha256:12", CacheError, "64 hex digits"),
        ("http://127.0.0.1/a", CacheError, "can only be read"),
        ("http://[::1/a", CacheError, "not a URL"),
        ("", CacheError, "no place is named"),
        (f"@{DIGEST}", CacheError, "no place is named"),
    ],
)
def test_urls_that_cannot_work_are_refused(
    shared_cache: Path, url: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        push(shared_cache, url)


def test_a_missing_package_names_the_extra(
    shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was imported before is remembered behind a read-only view.
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'duet-unlearn\[s3\]'"):
        push(shared_cache, "s3://bucket/x")


def test_a_place_that_holds_files_of_others_is_refused(shared_cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "theirs"
    place.mkdir()
    (place / "README.md").write_text("mine")
    (place / ".notes.tmp").write_text("mine")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(ConfigurationError, match=r"not empty.*found .notes.tmp"):
        push(shared_cache, str(place))
    with pytest.raises(ConfigurationError, match="not empty"):
        pull(str(shared_cache), place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_folders_that_cannot_be_meant_are_refused(
    shared_cache: Path, make_cache, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "cache", shards=1)
    before = files(cache)
    with pytest.raises(ConfigurationError, match="is empty"):
        pull(str(shared_cache), "")
    for inside in (cache / "shards", cache / "shards" / "new"):
        with pytest.raises(DuetError, match="lies inside the cache"):
            pull(str(shared_cache), inside)
        with pytest.raises(DuetError, match="lies inside the cache"):
            push(shared_cache, str(inside))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DuetError, match="a file"):
        push(shared_cache, str(tmp_path / "file"))
    assert files(cache) == before


def test_two_may_push_one_cache_to_one_place_at_once(shared_cache: Path, tmp_path: Path) -> None:
    for attempt in range(5):
        there = tmp_path / str(attempt)
        with ThreadPoolExecutor(max_workers=3) as pool:
            list(pool.map(lambda _, to=there: push(shared_cache, str(to)), range(3)))
        assert files(there) == files(shared_cache)
        assert not [path for path in there.rglob(".*") if path.is_file()]


def test_a_pushed_file_is_on_the_disk_before_it_has_its_name(
    shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, synced, fsync = tmp_path / "there", {}, files_module.fsync

    def watch(path: Path) -> None:
        if path.suffix == ".tmp":
            final = path.name[1:].rsplit(".", 2)[0]
            synced[final] = (path.read_bytes(), (path.parent / final).exists())
        fsync(path)

    monkeypatch.setattr(files_module, "fsync", watch)
    push(shared_cache, str(there))
    sent = {name.rpartition("/")[2]: (data, False) for name, data in files(there).items()}
    assert synced == sent


def test_what_a_stopped_pull_and_others_left_in_shards_is_told_apart(
    shared_cache: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    pull(str(shared_cache), here)
    (here / "manifest.json").unlink()
    (here / SHARD).unlink()
    ours, theirs = (here / "shards" / f".{name}.tmp" for name in (f"{SHARD[7:]}.12", "notes"))
    ours.write_bytes(b"half")
    theirs.write_bytes(b"mine")
    manifest = here / f".manifest.json.{'a' * 32}.tmp"
    manifest.write_bytes(b"half")
    assert pull(str(shared_cache), here).moved_shards == 1
    assert not manifest.exists()
    assert (ours.exists(), theirs.exists()) == (False, True)


def test_a_password_in_the_place_is_nowhere_in_what_comes_back(shared_cache: Path) -> None:
    result = push(shared_cache, f"memory://me:s3cr3t@host/{shared_cache.parent.name}")
    assert result.place == f"memory://host/{shared_cache.parent.name}"
