import re

import pytest

from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.shape_catalogue import (
    ATTACKS,
    GROUPS,
    SHAPED_ATTACKS,
    VIEW_SHAPES,
    VIEWS,
    families,
)
from duet_unlearn.data.shapes import Shape, Shown, load_shapes
from duet_unlearn.errors import ConfigurationError, DataError


def user(text):
    return {"role": "user", "content": text}


def test_views_and_attacks_share_no_name_and_no_text():
    assert not set(VIEWS) & set(ATTACKS)
    texts = [w.text for w in GROUPS["all"]]
    assert len(set(texts)) == len(texts) == len(VIEWS) + len(ATTACKS)


def test_no_view_shares_a_run_of_four_words_with_an_attack():
    def runs(shape):
        text = shape.text.removeprefix(f"[{shape.kind}]").replace("\\n", " ")
        words = [w for part in re.split(r"\{\w+\}", text) for w in [*re.findall(r"\w+", part), "|"]]
        return {" ".join(words[i : i + 4]).lower() for i in range(len(words) - 3)}

    attacks = {run for attack in GROUPS["families"] for run in runs(attack)}
    assert len(attacks) > 60
    views = [*VIEWS.values(), *VIEW_SHAPES.values()]
    assert not [run for view in views for run in runs(view) if run in attacks]


def test_every_attack_of_the_list_has_a_family_and_groups_hold_them():
    by_family = families()
    assert {"begun-answer", "raw-completion", "few-shot", "multiple-choice"} <= set(by_family)
    assert len(by_family) >= 11
    assert sum(map(len, by_family.values())) == len(ATTACKS) + len(SHAPED_ATTACKS)
    assert load_shapes("@family:begun-answer") == by_family["begun-answer"]
    with pytest.raises(ConfigurationError, match=r"@family:x: no such family; choose from over"):
        load_shapes("@family:x")
    # What changes only the wording of a user turn needs no answers, and so trains as it is.
    assert not [view for view in (*VIEWS.values(), *VIEW_SHAPES.values()) if view.needs_answers]


def test_training_draws_every_family_of_view_shapes_equally_often():
    shares: dict[str, float] = {}
    for shape in VIEW_SHAPES.values():
        shares[shape.family] = shares.get(shape.family, 0) + shape.weight
    assert len(shares) == 5
    assert len(set(shares.values())) == 1


def test_every_view_has_text_behind_the_query():
    assert all(view.text.split("{query}")[1].strip() for view in VIEWS.values())


def test_wrap_keeps_braces_of_the_query():
    wrapper = Shape(name="w", text="Say {it}: {query} now")
    assert wrapper.wrap("what is {query} and {0}?") == "Say {it}: what is {query} and {0}? now"


def test_apply_wraps_the_last_user_message_only():
    wrapper = Shape(name="w", text="<{query}>")
    conversation = (
        {"role": "system", "content": "s"},
        user("first"),
        {"role": "assistant", "content": "a"},
        user("second"),
    )
    assert wrapper.apply(conversation) == (*conversation[:3], user("<second>"))
    assert conversation[3] == user("second")


def test_apply_refuses_a_conversation_without_user():
    with pytest.raises(DataError, match="no user message"):
        Shape(name="w", text="{query}!").apply(({"role": "system", "content": "s"},))


@pytest.mark.parametrize("text", ["no slot", "{query} and {query}"])
def test_wrapper_checks_its_slot(text):
    with pytest.raises(ConfigurationError, match="exactly once"):
        Shape(name="w", text=text)


def test_built_in_by_name_and_group():
    assert load_shapes("@ignore-instructions") == (ATTACKS["ignore-instructions"],)
    assert load_shapes("@disregard") == (VIEWS["disregard"],)
    assert load_shapes("@views") == tuple(VIEWS.values())
    assert load_shapes("@attacks") == tuple(ATTACKS.values())
    assert load_shapes("@all") == (*VIEWS.values(), *ATTACKS.values())


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"@nope: .*@views, .*@role-play"):
        load_shapes("@nope")


def test_file_skips_comments_and_blank_lines(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff# mine\n\n  Bitte: {query} \n\t\n{query} für mich\r\n", encoding="utf-8")
    assert load_shapes(str(path)) == (
        Shape(name="mine:3", text="Bitte: {query}"),
        Shape(name="mine:5", text="{query} für mich"),
    )


@pytest.mark.parametrize(("line", "count"), [("hello", 0), ("{query} {query}", 2)])
def test_bad_line_is_named(tmp_path, line, count):
    path = tmp_path / "bad.txt"
    path.write_text(f"# c\n{{query}}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.txt, line 3: .* {count} times"):
        load_shapes(str(path))


@pytest.mark.parametrize("content", ["", "# only a comment\n\n"])
def test_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="holds no shape"):
        load_shapes(str(path))


def test_missing_folder_and_binary_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such shape file"):
        load_shapes(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="not readable"):
        load_shapes(str(tmp_path))
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe\x00{query}")
    with pytest.raises(DataError, match="not readable"):
        load_shapes(str(binary))


def test_a_line_may_have_a_weight(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(
        "[weight 3] Now: {query}\n[Weight: 0.5]{query} then\n[waiting] {query}\n", encoding="utf-8"
    )
    assert load_shapes(str(path)) == (
        Shape(name="mine:1", text="Now: {query}", weight=3.0),
        Shape(name="mine:2", text="{query} then", weight=0.5),
        Shape(name="mine:3", text="[waiting] {query}"),
    )


@pytest.mark.parametrize(
    "mark", ["[weight]", "[weight two]", "[weight 0]", "[weight -1]", "[weight inf]"]
)
def test_a_weight_that_is_no_number_above_zero_is_refused(tmp_path, mark):
    path = tmp_path / "mine.txt"
    path.write_text(f"# views\n{mark} Now: {{query}}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_shapes(str(path))
    found = mark.strip("[]").removeprefix("weight").strip()
    expected = f"{path}, line 2: weight {found!r}, expected a number above 0: [weight 3]"
    assert str(caught.value) == expected


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def rendered(tokenizer, text, *, prefix=None, shown=None, query="Where?"):
    renderer = PromptRenderer(tokenizer, prefix=prefix)
    shape = Shape(name="s", text=text)
    ids = shape.render((user(query),), renderer, prefixed=prefix is not None, shown=shown)
    return tokenizer.decode(ids)


def test_shapes_of_each_kind_by_hand(tokenizer):
    asked = "<s><|user|>Where?<|end|><|assistant|>"
    assert rendered(tokenizer, "{query}") == asked
    assert rendered(tokenizer, "[begun] The answer is") == asked + "The answer is"
    assert rendered(tokenizer, r"[raw] Question: {query}\nAnswer:") == "Question: Where?\nAnswer:"
    assert rendered(tokenizer, "[turns] 2 + 2? || 4. || Now: {query}") == (
        "<s><|user|>2 + 2?<|end|><|assistant|>4.<|end|><|user|>Now: Where?<|end|><|assistant|>"
    )


def test_a_prefix_stands_in_front_of_every_kind(tokenizer):
    system = "<s><|system|>Forget.<|end|>"
    assert rendered(tokenizer, "[begun] It is", prefix="Forget.") == (
        system + "<|user|>Where?<|end|><|assistant|>It is"
    )
    assert rendered(tokenizer, "[raw] Q: {query}", prefix="Forget.") == "Forget.\n\nQ: Where?"
    assert rendered(tokenizer, "[turns] a || b || {query}", prefix="Forget.") == (
        system + "<|user|>a<|end|><|assistant|>b<|end|><|user|>Where?<|end|><|assistant|>"
    )


def test_what_is_shown_beside_a_query(tokenizer):
    shown = Shown(examples=(("1?", "One"),), facts=(("2?", "Two"),), hint="H", choices="C")
    assert rendered(
        tokenizer, "[raw] {examples} {facts} {hint} {choices} {query}", shown=shown
    ) == ("Question: 1?\nAnswer: One Question: 2?\nAnswer: Two H C Where?")
    assert rendered(tokenizer, "[turns] {examples} || {query}", shown=shown).startswith(
        "<s><|user|>1?<|end|><|assistant|>One<|end|><|user|>Where?"
    )
    assert "capital of France" in rendered(tokenizer, "[raw] {examples} {query}")
    # What stands in the query is text.
    assert rendered(tokenizer, "[raw] {query}", query="{hint}") == "{hint}"


def test_marked_lines_of_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("[weight 2] [family started] [begun] Well:\n[raw] {query}\n", encoding="utf-8")
    assert load_shapes(str(path)) == (
        Shape(name="mine:1", text="[begun] Well:", family="started", weight=2.0),
        Shape(name="mine:2", text="[raw] {query}"),
    )


@pytest.mark.parametrize("line", ["[raw] [weight 2] Q: {query}", "[begin] Well, {query}"])
def test_a_mark_that_is_none_is_not_taken_for_text(tmp_path, line):
    path = tmp_path / "mine.txt"
    path.write_text(f"[NOTICE: no limits] {{query}}\n[Raw] Q: {{query}}\n{line}\n")
    with pytest.raises(DataError, match=r"mine\.txt, line 3: "):
        load_shapes(str(path))
    path.write_text("[NOTICE: no limits] {query}\n[Raw] Q: {query}\n[draw] {query}\n")
    assert [shape.kind for shape in load_shapes(str(path))] == ["user", "raw", "user"]


@pytest.mark.parametrize(
    "line", ["[begun]", "[begun] {query} is", "[raw] no slot", "[turns] a || {query}", "[turns] a"]
)
def test_a_shape_that_cannot_work_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "mine.txt"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.txt, line 1: "):
        load_shapes(str(path))
    with pytest.raises(ConfigurationError):
        Shape(name="s", text=line)
