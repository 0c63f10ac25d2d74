import pytest

from duet_unlearn.distill.layer_numbers import parse_layers
from duet_unlearn.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", (3,)),
        ("5-7", (5, 6, 7)),
        ("0,3,5-7", (0, 3, 5, 6, 7)),
        (" 5 - 5, 1".replace(" - ", "-"), (1, 5)),
        ("4-6,5,0", (0, 4, 5, 6)),
    ],
)
def test_numbers_and_ranges(text, numbers):
    assert parse_layers(text) == numbers


@pytest.mark.parametrize("text", ["", "5-", "-1", "7-5", "1,,2", "a", "1.5", "1:3", "²"])
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigurationError, match=r"expected numbers and ranges such as 0,3,5-7"):
        parse_layers(text)
