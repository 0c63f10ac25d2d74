import pytest

from duet_unlearn.data.prefixes import CATALOGUE, resolve_prefix
from duet_unlearn.errors import ConfigurationError

TOPICAL = (
    "explicit",
    "paraphrased",
    "in-context-unlearning",
    "forgotten",
    "must-refuse",
    "only-reply",
    "if-about",
)


def test_catalogue_names_are_the_documented_ones():
    assert list(CATALOGUE) == [*TOPICAL, "refuse-everything", "irrelevant"]
    for name, template in CATALOGUE.items():
        assert template.name == name
        assert template.description
        assert "\n" not in template.description
        assert template.text == template.text.strip()


@pytest.mark.parametrize("name", TOPICAL)
def test_topic_fills_every_slot(name):
    text = resolve_prefix(f"@{name}", "Salt & Stars")
    assert "Salt & Stars" in text
    assert "{topic}" not in text


@pytest.mark.parametrize("name", ["refuse-everything", "irrelevant"])
def test_controls_need_no_topic_and_accept_one(name):
    assert resolve_prefix(f"@{name}") == CATALOGUE[name].text
    assert resolve_prefix(f"@{name}", "anything") == CATALOGUE[name].text


def test_free_text_passes_unchanged():
    text = 'Never mention {name} or {"json": 1}. mail@example.org'
    assert resolve_prefix(text) == text
    assert resolve_prefix(text, "unused") == text


def test_free_text_takes_the_topic_and_keeps_braces():
    assert resolve_prefix("No {topic}, no {x}.", " {odd} ") == "No {odd}, no {x}."


@pytest.mark.parametrize("text", ["@explicit", "Forget {topic}."])
def test_missing_topic_names_the_flag(text):
    with pytest.raises(ConfigurationError, match="--topic"):
        resolve_prefix(text)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"@explcit.*@explicit, @paraphrased.*@irrelevant"):
        resolve_prefix("@explcit", "x")


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_prefix_is_refused(text):
    with pytest.raises(ConfigurationError, match="prefix is empty"):
        resolve_prefix(text)


def test_empty_topic_is_refused():
    with pytest.raises(ConfigurationError, match="--topic is empty"):
        resolve_prefix("@explicit", " ")


@pytest.mark.parametrize("slot", ["{Topic}", "{ topic }"])
def test_a_slot_that_is_nearly_right_is_no_text(slot):
    with pytest.raises(ConfigurationError, match=r"the slot is \{topic\}"):
        resolve_prefix(f"You have forgotten {slot}.", "Bob")
