"""An earlier request's cache beside a new one: which rows are drawn, and what is recorded."""

import logging
from pathlib import Path

import numpy as np
import pytest
import yaml

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives.base import open_objective
from duet_unlearn.distill.run import run
from duet_unlearn.errors import ConfigurationError, MismatchError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.format.schema import SPLITS
from duet_unlearn.teacher_cache.reader import CacheReader


def build_request(folder: Path, model: Path, forget: list[str], retain: list[str], **more) -> str:
    folder.mkdir()
    files = {}
    for split, words in (("forget", forget), ("retain", retain)):
        files[split] = (str(folder / f"{split}.txt.jsonl"),)
        lines = (f'{{"query": "Who is the keeper of {word}?"}}\n' for word in words)
        Path(files[split][0]).write_text("".join(lines), encoding="utf-8")
    config = {"teacher": str(model), "engine": "transformers", "top_k": 20, "check": False}
    build(BuildConfig(out=folder / "cache", **files, **{**config, **more}))
    return str(folder / "cache")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[str, str]:
    """Two requests: the second forgets some of what the first retained, and the other way round."""
    folder = tmp_path_factory.mktemp("requests")
    lanterns, rivers, towers = (
        [f"{name} {i}" for i in range(6)] for name in ("lantern", "river", "tower")
    )
    first = build_request(
        folder / "first", tiny_model, lanterns, rivers, prefix="Forget lanterns.", shard_rows=4
    )
    second = build_request(
        *(folder / "second", tiny_model, rivers[:4], [*lanterns[:2], *towers[:5]]),
        prefix="Forget rivers.",
        top_k=12,
    )
    return first, second


def test_an_earlier_cache_gives_its_forget_rows_alone(
    requests: tuple[str, str], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = requests
    caplog.set_level(logging.INFO)
    config = RunConfig(cache=second, replay=(first,), student=str(tiny_model), out="out")
    objective = open_objective(config, open_student(str(tiny_model)))
    assert objective.settings["top_k"] == 12  # the smaller of the two
    # 4 rivers and 6 lanterns; of the retained, the two lanterns are to stay forgotten.
    assert objective.order.counts == {"forget": 10, "retain": 5}
    assert "2 retain queries of" in caplog.text
    new, earlier = CacheReader.open(second), CacheReader.open(first)
    texts = [text for _, _, text in (*new.identities(), *earlier.identities())]
    drawn = {texts[row] for row in np.flatnonzero(objective.order.splits == 0)}
    assert drawn == {
        f"Who is the keeper of {word}?"
        for word in (*(f"river {i}" for i in range(4)), *(f"lantern {i}" for i in range(6)))
    }
    dataset = objective.dataset
    groups = objective.order.row_groups
    assert [row for group in groups for row in group] == list(range(len(texts)))
    for row in range(earlier.num_rows):
        joined, alone = dataset.reader.row(new.num_rows + row), earlier.row(row)
        assert joined.query_id == alone.query_id
        assert np.array_equal(joined.logits, alone.logits)


def test_the_same_request_twice_is_drawn_once(requests: tuple[str, str], tiny_model: Path) -> None:
    first, second = requests
    config = RunConfig(cache=second, replay=(first, second, first), student="s", out="out")
    objective = open_objective(config, open_student(str(tiny_model)))
    assert objective.order.counts == {"forget": 10, "retain": 5}


def test_a_cache_that_forgets_nothing_is_refused(
    requests: tuple[str, str], tiny_model: Path, tmp_path: Path, build_tiny_cache
) -> None:
    kept = build_tiny_cache(tmp_path / "kept", forget=0, retain=4)
    config = RunConfig(cache=requests[1], replay=(str(kept),), student="s", out="out")
    with pytest.raises(MismatchError, match="kept/cache: no forget queries in this cache; leave"):
        open_objective(config, open_student(str(tiny_model)))


def test_a_student_records_what_was_replayed(
    requests: tuple[str, str], tiny_model: Path, tmp_path: Path, one_thread: None
) -> None:
    first, second = requests
    config = RunConfig(
        cache=second, student=str(tiny_model), out=str(tmp_path / "student"), epochs=1, batch_size=4
    )
    plain = run(config.replaced(out=str(tmp_path / "plain")))
    replayed = config.replaced(replay=(first,))
    found = run(replayed)
    assert (plain.steps, found.steps) == (3, 4)  # of 11 and 15 queries
    assert run(replayed).hit
    kept = yaml.safe_load((tmp_path / "student" / "duet_run.yaml").read_text(encoding="utf-8"))
    digest = CacheReader.open(first).manifest.digest
    assert kept["replay"] == [f"cache@{digest}"]
    assert digest in (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    again = run(replayed.replaced(out=str(tmp_path / "again"), replay=(f"{first}@{digest}",)))
    weights = [(Path(r.out) / "model.safetensors").read_bytes() for r in (found, again, plain)]
    assert weights[0] == weights[1] != weights[2]


def test_an_objective_without_a_cache_replays_nothing() -> None:
    with pytest.raises(ConfigurationError, match="objective gradient-difference takes none"):
        RunConfig(
            objective="gradient-difference",
            forget=("f",),
            retain=("r",),
            replay=("cache",),
            student="s",
            out="o",
        )


def test_queries_that_are_no_longer_retained_leave_the_others_their_views(
    tiny_model: Path, tmp_path: Path
) -> None:
    rivers = [f"river {i}" for i in range(6)]
    views = tmp_path / "views.txt"
    views.write_text("[begun] The answer is\n[raw] Question: {query}\\nAnswer:\n")
    settings = {"views": (str(views),), "views_per_query": 1, "prefix": "Forget it."}
    first = build_request(tmp_path / "first", tiny_model, rivers[:3], ["tower"], prefix="Forget.")
    second = build_request(tmp_path / "second", tiny_model, ["lantern"], rivers, **settings)
    config = RunConfig(cache=second, replay=(first,), student=str(tiny_model), out="out")
    order = open_objective(config, open_student(str(tiny_model))).order
    assert order.counts == {"forget": 4, "retain": 3}
    assert order.view_mask is not None
    mask = {code: order.view_mask[order.splits == SPLITS.index(code)] for code in order.counts}
    assert mask["retain"].sum(axis=1).tolist() == [1, 1, 1]
    assert mask["forget"].all()
    assert order.num_sequences == 14
