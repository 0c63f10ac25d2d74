from pathlib import Path

import pytest

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.settings import fields
from duet_unlearn.settings_file import load as load_settings

NEEDED = "cache: c\nstudent: m\nout: o\n"


def load(tmp_path: Path, text: str, **given) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_settings(RunConfig, str(path), given)


def message_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    prefix = f"{tmp_path / 'run.yaml'}"
    assert message.startswith(prefix)
    return message.removeprefix(prefix)


def test_values_are_read_by_the_type_of_their_field(tmp_path):
    config = load(
        tmp_path,
        NEEDED + "learning_rate: 1e-4\n"  # text to YAML 1.1
        "delta: 2\nbatch_size: 8\ntop_k: null\ngradient_checkpointing: on\n"
        'views: ["@remember", views.txt]\nweight_decay: .5\n',
    )
    assert config == RunConfig(
        cache="c",
        student="m",
        out="o",
        learning_rate=1e-4,
        delta=2.0,
        batch_size=8,
        gradient_checkpointing=True,
        views=("@remember", "views.txt"),
        weight_decay=0.5,
    )
    # Names that YAML would take for a date, a number and a truth value.
    config = load(tmp_path, "cache: 2026-01-31\nstudent: 007\nout: no\nviews: views.txt\n")
    assert (config.cache, config.student, config.out) == ("2026-01-31", "007", "no")
    assert config.views == ("views.txt",)


def test_what_is_given_beside_the_file_wins(tmp_path):
    config = load(tmp_path, NEEDED + "epochs: 3\nseed: 4\n", epochs=5, out="elsewhere")
    assert (config.epochs, config.seed, config.out) == (5, 4, "elsewhere")
    # A student's own file says how far `auto` went: another number of epochs is not cut off there.
    assert load(tmp_path, NEEDED + "epochs: 2\nmax_steps: 120\n", epochs=5).max_steps is None
    assert load(tmp_path, NEEDED + "max_steps: 120\n", epochs=5, max_steps=9).max_steps == 9
    assert load(tmp_path, NEEDED + "epochs: 2\nmax_steps: 120\n", max_steps=500).epochs == "auto"
    assert load(tmp_path, NEEDED + "epochs: 5\nmax_steps: 120\n", seed=1).max_steps == 120
    # A value of the file that is overruled is not held against it.
    assert load(tmp_path, NEEDED + "epochs: 0\n", epochs=2).epochs == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", ", line 1: no setting 'epoch'; did you mean epochs?"),
        ("out: o\nlearning-rate: 1\n", ", line 2: no setting 'learning-rate'; did you mean"),
        ("lerning_rate: 1\n", "did you mean learning_rate?"),
        ("wzzx: 1\n", ", line 1: no setting 'wzzx'; there are cache, student, out, "),
        ("[a]: 1\n", ", line 1: a list, expected the name of a setting"),
        ("seed: 1\nout: o\nseed: 2\n", ", line 3: seed stands in line 1 already; give it once"),
        ("\nepochs: many\n", ", line 2: epochs is 'many', expected a whole number"),
        ("epochs: 2.5\n", ": epochs is '2.5', expected a whole number"),
        ("epochs: true\n", ": epochs is 'true', expected a whole number"),
        ("epochs:\n", ", line 1: epochs is empty, expected a whole number"),
        ("epochs: [1]\n", ": epochs is a list, expected a whole number"),
        ("out: {a: b}\n", ": out is a group of settings, expected text"),
        ("out: !!python/name:os.system x\n", ": out is 'x', expected text"),
        ("delta: big\n", ": delta is 'big', expected a number"),
        ("overwrite: 2\n", ": overwrite is '2', expected true or false"),
        ("views: [[a]]\n", ": views is a list, expected a list of texts"),
        (NEEDED + "epochs: 0\n", ", line 4: epochs is '0', expected a whole number, 1 or more"),
        (NEEDED + "learning_rate: fast\n", ", line 4: learning_rate is 'fast', expected a number"),
        ("- a\n- b\n", ", line 1: a list, expected settings as `name: value`"),
        ("hello\n", ", line 1: 'hello', expected settings as `name: value`"),
        ("", ": holds no settings; write `name: value`, one a line"),
        ("# only words\n", ": holds no settings"),
        ("out: o\nviews: [@remember]\n", ", line 2: not YAML (found character '@' that cannot "),
        ("views: @remember\n", "; put a name that begins with @ in quotes"),
        ("out: 'o\n", ", line 2: not YAML (found unexpected end of stream)"),
        ("out: o\n---\nout: p\n", ", line 2: not YAML (but found another document)"),
        ("out: \x07\n", ": not YAML ("),
        ("trainer_args: &a {x: *a}\n", ", line 1: an alias (*a), expected the value itself"),
        ("out: &o here\nstudent: *o\n", ", line 2: an alias (*o), expected the value itself"),
        ("student: m\n", ": out is missing; give it"),
    ],
)
def test_a_wrong_file_ends_in_one_line_that_says_where(tmp_path, text, message):
    assert message in message_of(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.yaml: no such file"):
        load_settings(RunConfig, str(tmp_path / "none.yaml"), {})
    with pytest.raises(ConfigurationError, match="not readable as UTF-8 text"):
        load_settings(RunConfig, str(tmp_path), {})
    (tmp_path / "latin.yaml").write_bytes(b"out: caf\xe9\n")
    with pytest.raises(ConfigurationError, match=r"not readable as UTF-8 text \(not UTF-8\)"):
        load_settings(RunConfig, str(tmp_path / "latin.yaml"), {})


def test_what_a_setting_overrules_is_a_setting():
    known = fields(RunConfig)
    assert [name for field in known.values() for name in field.overrules] == ["max_steps", "epochs"]
    assert {"max_steps", "epochs"} <= known.keys()
