from pathlib import Path

import pytest

from duet_unlearn.data.shape_catalogue import VIEWS
from duet_unlearn.distill.batches.views import describe_views, draw_weights, load_views
from duet_unlearn.errors import ConfigurationError, DataError


def shares(*sources: str) -> dict[str, float]:
    return {view.name: view.weight for view in load_views(sources)}


def test_a_weight_stands_behind_a_source_and_counts_for_each_of_its_views(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("[weight 2] Now: {query}\n{query} Go.\n", encoding="utf-8")
    assert shares("@remember=3", str(path)) == {"remember": 3, "mine:1": 2, "mine:2": 1}
    assert shares(f"{path}=0.5") == {"mine:1": 1, "mine:2": 0.5}
    assert set(shares("@views=2").values()) == {2}
    assert list(shares("@views")) == list(VIEWS)


def test_a_view_named_again_takes_the_later_weight():
    weights = shares("@views", "@remember=3")
    assert len(weights) == len(VIEWS)
    assert weights.pop("remember") == 3
    assert set(weights.values()) == {1}


def test_an_equals_sign_may_stand_in_the_name_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=2").write_text("Now: {query}\n", encoding="utf-8")
    assert shares("a=2") == {"a=2:1": 1}
    assert shares("a=2=3") == {"a=2:1": 3}
    with pytest.raises(DataError, match="b=c: no such shape file"):
        load_views(["b=c"])


def test_the_home_of_nobody_is_one_line():
    with pytest.raises(ConfigurationError, match="there is no user 'nobody-of-that-name' here"):
        load_views(["~nobody-of-that-name/views.txt=2"])


def test_without_a_source_the_views_are_those_of_the_cache():
    cached = [r"[begun] Here is what I recall about that:\n", "Now: {query}"]
    assert [view.name for view in load_views((), cached)] == ["recollection", "Now: {query}"]
    assert [view.name for view in load_views(["@remember"], cached)] == ["remember"]
    assert load_views(["none"], cached) == ()
    with pytest.raises(ConfigurationError, match="view none stands beside others"):
        load_views(["none", "@remember"], cached)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "two", ""])
def test_a_weight_is_a_number_above_zero(weight):
    with pytest.raises(ConfigurationError) as caught:
        load_views([f"@remember={weight}"])
    assert str(caught.value) == (
        f"view @remember={weight}: weight {weight!r}, expected a number above 0"
    )


def test_equal_weights_are_no_weights():
    assert draw_weights(load_views(["@remember=2", "@disregard=2"])) is None
    assert draw_weights(()) is None
    weighted = load_views(["@remember=6", "@disregard=2"])
    assert draw_weights(weighted) == (3, 1)
    assert describe_views(weighted) == "remember (75%), disregard (25%)"
    assert describe_views(load_views(["@remember=6"])) == "remember"
    assert describe_views(()) == "none"
