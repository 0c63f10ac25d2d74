import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from duet_unlearn import (
    ConfigurationError,
    CorruptCacheError,
    RequirementError,
    build_cache,
    distill,
    evaluate,
    open_cache,
)


def test_the_whole_path_from_python(tiny_model: Path, write_queries, tmp_path: Path) -> None:
    forget, retain = write_queries("forget", 6), write_queries("retain", 6, "river")
    built = build_cache(
        teacher=tiny_model,
        forget=forget,
        retain=[retain],
        prefix="@explicit",
        topic="lanterns",
        out=tmp_path / "cache",
        engine="transformers",
        top_k=8,
        shard_rows=4,
    )
    assert (built.computed_rows, built.hit) == (12, False)
    assert "lanterns" in built.manifest.recipe.prefix
    student = distill(
        tmp_path / "cache", student=tiny_model, out=tmp_path / "student", max_steps=2, batch_size=4
    )
    assert student.steps == 2
    report = evaluate(
        {"base": tiny_model, "student": student.out},
        forget=forget,
        retain=retain,
        limit=2,
        max_new_tokens=3,
    )
    assert list(report.answers) == ["base", "student"]
    with pytest.raises(RequirementError, match="student: forget is") as caught:
        evaluate(
            {"base": tiny_model, "student": student.out},
            **{"forget": forget, "retain": retain, "limit": 2, "max_new_tokens": 3},
            require="forget>100",
        )
    assert list(caught.value.report.answers) == ["base", "student"]


def test_distill_is_the_package_and_the_function() -> None:
    import duet_unlearn
    import duet_unlearn.distill.config as config

    assert duet_unlearn.distill is distill
    assert config.RunConfig.__module__ == "duet_unlearn.distill.config"
    with pytest.raises(ConfigurationError, match=r"no setting 'epoch'; did you mean epochs\?"):
        distill("cache", student="model", out="out", epoch=1)


def test_an_unknown_setting_of_a_build_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no setting .topk.; did you mean top_k"):
        build_cache(teacher="m", prefix="p", out=tmp_path, forget="f.jsonl", topk=3)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import duet_unlearn, sys; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_open_cache_is_a_sequence_of_rows(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    assert len(cache) == 30
    rows = list(cache)
    assert [row.query_id for row in rows] == [cache.row(i).query_id for i in range(30)]
    assert cache[-1].query_id == rows[29].query_id
    assert [row.query_id for row in cache[28:40]] == [row.query_id for row in rows[28:]]
    assert [row.query_id for row in cache[5:0:-2]] == [rows[i].query_id for i in (5, 3, 1)]
    for index in (30, -31):
        with pytest.raises(IndexError):
            cache[index]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # with one core
@pytest.mark.parametrize("processes", [0, 2])
def test_a_cache_as_a_torch_dataset(tiny_cache: Path, processes: int) -> None:
    from torch.utils.data import DataLoader

    cache = open_cache(tiny_cache)
    cache[0]  # a file is open before the loader starts its processes
    loader = DataLoader(cache.torch_dataset(), batch_size=None, num_workers=processes)
    rows = list(loader)
    assert len(rows) == 30
    for row, expected in zip(rows, cache, strict=True):
        assert row["query_id"] == expected.query_id
        for name in ("prompt_ids", "response_ids", "token_ids", "logits", "logsumexp"):
            values = getattr(expected, name)
            assert row[name].shape == values.shape
            assert np.array_equal(row[name].numpy(), values)


def test_a_dataset_at_a_url_reaches_another_process(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUET_CACHE_HOME", str(tmp_path))
    dataset = open_cache(tiny_cache.as_uri()).torch_dataset()
    first = dataset[0]  # the connection is open
    copied = pickle.loads(pickle.dumps(dataset))  # noqa: S301 our own
    assert copied[0]["query_id"] == first["query_id"]
    assert not list(tmp_path.rglob("00002-of-*.parquet"))
    assert copied[20]["query_id"] == dataset[20]["query_id"]  # by a connection of its own
    assert len(copied) == len(dataset)


def test_a_shard_that_changes_under_an_open_dataset_is_noticed(
    build_tiny_cache, tmp_path: Path
) -> None:
    folder = build_tiny_cache(tmp_path)
    dataset = open_cache(folder).torch_dataset()
    assert dataset[0]["split"] == "forget"
    shard = sorted((folder / "shards").iterdir())[-1]
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(CorruptCacheError, match="its bytes have"):
        dataset[len(dataset) - 1]
