import json
from pathlib import Path

import pytest
from filelock import FileLock

from duet_unlearn.distill.output import run_folder
from duet_unlearn.distill.output.run_folder import RunFolder
from duet_unlearn.errors import ConfigurationError, OutputError

IDENTITY = {"settings": {"delta": 1.0}, "cache": "sha256:a", "base": "sha256:b", "views": []}


def folder_of(path: Path, **changes) -> RunFolder:
    return RunFolder(out=path / "student", identity={**IDENTITY, **changes})


def test_publish_renames_the_student_and_removes_the_work(tmp_path):
    folder = folder_of(tmp_path)
    folder.prepare(overwrite=False)
    folder.staged_student.mkdir()
    (folder.staged_student / "config.json").write_text("{}")
    assert not folder.out.exists()
    folder.publish(overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert (folder.out / "config.json").is_file()


def test_an_empty_folder_is_taken(tmp_path):
    folder = folder_of(tmp_path)
    folder.out.mkdir()
    folder.prepare(overwrite=False)
    folder.staged_student.mkdir()
    folder.publish(overwrite=False)
    assert folder.out.is_dir()


def test_a_student_that_appeared_meanwhile_is_replaced_only_where_asked(tmp_path):
    folder = folder_of(tmp_path)
    folder.prepare(overwrite=False)
    folder.staged_student.mkdir()
    folder.out.mkdir()
    other = {"identity": folder_of(tmp_path, cache="sha256:c").identity, "files": ["duet_run.json"]}
    (folder.out / "duet_run.json").write_text(json.dumps(other))
    with pytest.raises(OutputError, match="another run's student appeared there"):
        folder.publish(overwrite=False)
    assert (folder.out / "duet_run.json").is_file()
    assert folder.staged_student.is_dir()
    folder.publish(overwrite=True)
    assert not list(folder.out.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_touched(tmp_path, overwrite):
    folder = folder_of(tmp_path)
    folder.out.mkdir()
    (folder.out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigurationError, match="holds files that are no student"):
        folder.prepare(overwrite=overwrite)
    (folder.out / "thesis.tex").rename(tmp_path / "thesis.tex")
    folder.out.rmdir()
    folder.work.mkdir()
    (folder.work / "notes").write_text("")
    with pytest.raises(ConfigurationError, match="holds files that are no unfinished run"):
        folder.prepare(overwrite=overwrite)


def test_another_run_is_refused_with_what_differs(tmp_path):
    folder_of(tmp_path).prepare(overwrite=False)
    checkpoint = folder_of(tmp_path).work / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    other = folder_of(tmp_path, cache="sha256:c", settings={"delta": 2.0})
    with pytest.raises(ConfigurationError) as caught:
        other.prepare(overwrite=False)
    assert "cache is 'sha256:a', now 'sha256:c'; delta is 1.0, now 2.0" in str(caught.value)
    other.prepare(overwrite=True)
    assert not checkpoint.exists()


def test_another_run_that_never_saved_is_given_up(tmp_path):
    folder_of(tmp_path).prepare(overwrite=False)
    (folder_of(tmp_path).work / "duet_log.jsonl").write_text("{}\n")
    other = folder_of(tmp_path, cache="sha256:c")
    other.prepare(overwrite=False)
    assert [path.name for path in other.work.iterdir()] == ["identity.json"]


def test_only_complete_checkpoints_count_and_the_newest_wins(tmp_path):
    folder = folder_of(tmp_path)
    folder.prepare(overwrite=False)
    for step in (9, 10, 11):
        (folder.work / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (folder.work / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (folder.work / "checkpoint-11" / "trainer_state.json").write_text('{"global_s')
    folder.prepare(overwrite=False)
    assert folder.last_checkpoint() == folder.work / "checkpoint-10"


def test_a_finished_student_is_known_by_its_identity(tmp_path):
    folder = folder_of(tmp_path)
    assert folder.finished() is None
    folder.out.mkdir()
    (folder.out / "duet_run.json").write_text(json.dumps({"identity": IDENTITY, "result": 1}))
    assert folder.finished() == {"identity": IDENTITY, "result": 1}
    assert folder_of(tmp_path, base="sha256:d").finished() is None


def test_the_lock_file_is_gone_before_the_lock_is(tmp_path, monkeypatch):
    left_at_release = []

    class Watched(FileLock):
        def release(self, force: bool = False) -> None:
            left_at_release.append([path.name for path in tmp_path.iterdir()])
            super().release(force)

    monkeypatch.setattr(run_folder, "FileLock", Watched)
    with folder_of(tmp_path).lock():
        assert [path.name for path in tmp_path.iterdir()] == ["student.unfinished.lock"]
    assert left_at_release[0] == []


def test_two_runs_cannot_share_a_folder(tmp_path):
    refused = pytest.raises(ConfigurationError, match="another run is working")
    with folder_of(tmp_path).lock(), refused, folder_of(tmp_path).lock():
        pass
    with folder_of(tmp_path).lock():
        pass
    assert list(tmp_path.iterdir()) == []
