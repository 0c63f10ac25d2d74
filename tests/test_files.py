"""We touch only what we can prove we wrote."""

import json
from pathlib import Path

import pytest

from duet_unlearn.errors import ConfigurationError
from duet_unlearn.files import (
    CLAIM_NAME,
    claim_folder,
    release_claim,
    remove_temporary_files,
    user_path,
)


def nothing_is_ours(_: Path) -> bool:
    return False


def test_a_new_and_an_empty_folder_are_claimed_and_taken_up_again(tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        claim_folder(folder, nothing_is_ours)
        (folder / "half").touch()
        claim_folder(folder, nothing_is_ours)
        release_claim(folder)
        assert not (folder / CLAIM_NAME).exists()


def test_files_of_others_keep_a_folder_from_being_claimed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"not empty.*\(found README.md\)"):
        claim_folder(tmp_path, nothing_is_ours)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    claim_folder(tmp_path, lambda folder: (folder / "README.md").exists())


def test_a_file_and_the_inside_of_a_cache_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is a file"):
        claim_folder(tmp_path / "file", nothing_is_ours)
    cache = tmp_path / "cache"
    (cache / "shards").mkdir(parents=True)
    (cache / "manifest.json").write_text(json.dumps({"format": "duet-teacher-cache"}))
    with pytest.raises(ConfigurationError, match="lies inside the cache"):
        claim_folder(cache / "shards" / "new", nothing_is_ours)
    assert not (cache / "shards" / "new").exists()


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    ours = [".manifest.json.12.tmp", ".00000-of-00002.parquet.7.tmp", f".README.md.{'a' * 32}.tmp"]
    theirs = [".notes.tmp", ".thesis.md.12.tmp", "manifest.json.12.tmp"]
    for name in ours + theirs:
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "--out is empty"), ("  ", "--out is empty"), ("~no-such-user/x", "there is no user")],
)
def test_paths_that_name_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        user_path(text, "--out")
