import re

import pytest

from duet_unlearn.data.views import ATTACKS, GROUPS, VIEWS, Wrapper, load_wrappers
from duet_unlearn.errors import ConfigurationError, DataError


def user(text):
    return {"role": "user", "content": text}


def test_views_and_attacks_share_no_name_and_no_text():
    assert not set(VIEWS) & set(ATTACKS)
    texts = [w.text for w in GROUPS["all"]]
    assert len(set(texts)) == len(texts) == len(VIEWS) + len(ATTACKS)


def test_no_view_shares_a_run_of_four_words_with_an_attack():
    def runs(wrapper):
        words = [
            w for part in wrapper.text.split("{query}") for w in [*re.findall(r"\w+", part), "|"]
        ]
        return {" ".join(words[i : i + 4]).lower() for i in range(len(words) - 3)}

    attacks = {run for attack in ATTACKS.values() for run in runs(attack)}
    assert len(attacks) > 40
    assert not [run for view in VIEWS.values() for run in runs(view) if run in attacks]


def test_every_view_has_text_behind_the_query():
    assert all(view.text.split("{query}")[1].strip() for view in VIEWS.values())


def test_wrap_keeps_braces_of_the_query():
    wrapper = Wrapper(name="w", text="Say {it}: {query} now")
    assert wrapper.wrap("what is {query} and {0}?") == "Say {it}: what is {query} and {0}? now"


def test_apply_wraps_the_last_user_message_only():
    wrapper = Wrapper(name="w", text="<{query}>")
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
        Wrapper(name="w", text="{query}!").apply(({"role": "system", "content": "s"},))


@pytest.mark.parametrize("text", ["no slot", "{query} and {query}"])
def test_wrapper_checks_its_slot(text):
    with pytest.raises(ConfigurationError, match="exactly once"):
        Wrapper(name="w", text=text)


def test_built_in_by_name_and_group():
    assert load_wrappers("@ignore-instructions") == (ATTACKS["ignore-instructions"],)
    assert load_wrappers("@disregard") == (VIEWS["disregard"],)
    assert load_wrappers("@views") == tuple(VIEWS.values())
    assert load_wrappers("@attacks") == tuple(ATTACKS.values())
    assert load_wrappers("@all") == (*VIEWS.values(), *ATTACKS.values())


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"@nope: .*@views, .*@role-play"):
        load_wrappers("@nope")


def test_file_skips_comments_and_blank_lines(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff# mine\n\n  Bitte: {query} \n\t\n{query} für mich\r\n", encoding="utf-8")
    assert load_wrappers(str(path)) == (
        Wrapper(name="mine:3", text="Bitte: {query}"),
        Wrapper(name="mine:5", text="{query} für mich"),
    )


@pytest.mark.parametrize(("line", "count"), [("hello", 0), ("{query} {query}", 2)])
def test_bad_line_is_named(tmp_path, line, count):
    path = tmp_path / "bad.txt"
    path.write_text(f"# c\n{{query}}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.txt, line 3: .* {count} times"):
        load_wrappers(str(path))


@pytest.mark.parametrize("content", ["", "# only a comment\n\n"])
def test_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="holds no wrapper"):
        load_wrappers(str(path))


def test_missing_folder_and_binary_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such wrapper file"):
        load_wrappers(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="not readable"):
        load_wrappers(str(tmp_path))
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe\x00{query}")
    with pytest.raises(DataError, match="not readable"):
        load_wrappers(str(binary))


def test_a_line_may_have_a_weight(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(
        "[weight 3] Now: {query}\n[Weight: 0.5]{query} then\n[waiting] {query}\n", encoding="utf-8"
    )
    assert load_wrappers(str(path)) == (
        Wrapper(name="mine:1", text="Now: {query}", weight=3.0),
        Wrapper(name="mine:2", text="{query} then", weight=0.5),
        Wrapper(name="mine:3", text="[waiting] {query}"),
    )


@pytest.mark.parametrize(
    "mark", ["[weight]", "[weight two]", "[weight 0]", "[weight -1]", "[weight inf]"]
)
def test_a_weight_that_is_no_number_above_zero_is_refused(tmp_path, mark):
    path = tmp_path / "mine.txt"
    path.write_text(f"# views\n{mark} Now: {{query}}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_wrappers(str(path))
    assert str(caught.value) == f"{path}, line 2: {mark}, expected a number above 0: [weight 3]"
