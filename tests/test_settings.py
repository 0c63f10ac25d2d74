import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from duet_unlearn.cli.options import SettingsCommand
from duet_unlearn.errors import ConfigurationError, MissingSettingError
from duet_unlearn.settings import Count, Positive, Settings, Share, Whole, fields, setting, settings
from duet_unlearn.settings_file import load


@settings
class Bakery(Settings):
    oven: str = setting(flag="OVEN", group="Where", help="Which oven.")
    out: Path = setting(default=Path(), help="Where to.")
    rate: Positive | Literal["auto"] = setting(
        default="auto", group="How", aliases=("lr", "bf16"), help="How fast."
    )
    loaves: Count = setting(default=3, aliases=("num-loaves",), help="How many.")
    crumbs: Whole | None = setting(default=None, help="How many at most.")
    salt: Share = setting(default=0.5, help="How salty.")
    kind: Literal["rye", "oat"] = setting(default="rye", help="Of what.")
    crusts: tuple[str, ...] = setting(default=(), flag="--crust", help="Repeatable.")
    glaze: bool = setting(default=False, flag="--glaze/--no-glaze", help="Shiny.")
    extras: Mapping[str, Any] = setting(
        default_factory=dict, flag="--extra", decides=False, metavar="KEY=VALUE", help="More."
    )

    def __post_init__(self) -> None:
        if self.glaze and self.kind == "oat":
            raise ConfigurationError("glaze is True, but oat takes none")


@click.command("bake", cls=SettingsCommand, settings=Bakery)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def bake(ctx, as_json, **_):
    click.echo(load(Bakery, None, ctx.command.given(ctx)).to_json())


def run(*arguments):
    return CliRunner().invoke(bake, arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loaves": 0}, "loaves is 0, expected a whole number, 1 or more"),
        ({"loaves": True}, "loaves is True, expected a whole number, 1 or more"),
        ({"loaves": "3"}, "loaves is '3', expected a whole number, 1 or more"),
        ({"crumbs": -1}, "crumbs is -1, expected a whole number, 0 or more"),
        ({"salt": 1.5}, "salt is 1.5, expected a number, 0 to 1"),
        ({"rate": float("nan")}, "rate is nan, expected a number, above 0, or auto"),
        ({"rate": "fast"}, "rate is 'fast', expected a number, above 0, or auto"),
        ({"kind": "spelt"}, "kind is 'spelt', expected one of rye, oat"),
        ({"crusts": "thick"}, "crusts is 'thick', expected a list of texts"),
        ({"glaze": 1}, "glaze is 1, expected true or false"),
        ({"extras": 3}, "extras is 3, expected names with their values"),
        ({"glaze": True, "kind": "oat"}, "glaze is True, but oat takes none"),
        ({"lr": 1.0}, "no setting 'lr'; did you mean rate?"),
        ({"loafs": 1}, "no setting 'loafs'; did you mean loaves?"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ConfigurationError) as caught:
        Bakery(**{"oven": "o", **values})
    assert str(caught.value) == message


def test_settings_are_a_frozen_dataclass():
    bakery = Bakery(oven="o", rate=1)
    assert bakery.rate == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        bakery.loaves = 4
    with pytest.raises(ConfigurationError, match="loaves is 0"):
        bakery.replaced(loaves=0)
    assert bakery.replaced(loaves=5) == Bakery(oven="o", rate=1, loaves=5)
    with pytest.raises(MissingSettingError, match="oven is missing") as caught:
        Bakery()
    assert caught.value.setting == "oven"


def test_what_does_not_decide_is_no_part_of_the_identity():
    one = Bakery(oven="o", extras={"a": 1}, out=Path("p"))
    assert one.to_json()["extras"] == {"a": 1}
    assert one.to_json()["out"] == "p"
    assert one.identity() == Bakery(oven="o", out=Path("p")).identity()


def test_flags_are_the_fields():
    done = run(
        *["gas", "--rate", "1e-5", "--loaves", "7", "--crumbs", "0", "--kind", "oat"],
        *["--crust", "a", "--crust", "b", "--no-glaze", "--extra", "x-y=2", "--extra", "z=w"],
    )
    assert done.exit_code == 0, done.output
    expected = Bakery(
        oven="gas",
        rate=1e-5,
        loaves=7,
        crumbs=0,
        kind="oat",
        crusts=("a", "b"),
        extras={"x_y": 2, "z": "w"},
    )
    assert done.stdout == f"{expected.to_json()}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "1"), "No such option '--lr'. Did you mean '--rate'?"),
        (("--bf16", "1"), "No such option '--bf16'. Did you mean '--rate'?"),
        (("--num-loaves", "1"), "Did you mean '--loaves'?"),
        (("--loavse", "1"), "Did you mean '--loaves'?"),
        (("--jsno",), "Did you mean '--json'?"),
        (("--crumb", "1"), "'--crumbs'"),
        (("--loaves", "none"), "'none', expected a whole number, 1 or more"),
        (("--salt", "2"), "'2', expected a number, 0 to 1"),
        (("--extra", "nothing"), "'nothing': expected KEY=VALUE"),
        (("--extra", "a=1", "--extra", "a=2"), "a is given twice"),
    ],
)
def test_wrong_usage_says_what_is_right(arguments, message):
    done = run("gas", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_help_page_has_a_heading_a_group():
    page = run("--help").stdout
    assert page.index("Where:") < page.index("--out") < page.index("How:") < page.index("--rate")
    assert page.index("--extra KEY=VALUE") < page.index("Other options:") < page.index("--json")
    assert "--rate auto|NUMBER" in page


def test_a_file_holds_the_same(tmp_path):
    file = tmp_path / "bakery.yaml"
    file.write_text(
        "oven: 2026-01-31\nrate: 1e-5\ncrusts: thin\nglaze: yes\n"
        'extras: {a: 1, b: [x, 2.5], c: "3", d: true}\n'
    )
    found = load(Bakery, str(file), {"loaves": 9})
    extras = {"a": 1, "b": ["x", 2.5], "c": "3", "d": True}
    assert found == Bakery(
        oven="2026-01-31", rate=1e-5, crusts=("thin",), glaze=True, extras=extras, loaves=9
    )
    file.write_text("oven: o\nlr: 1\n")
    with pytest.raises(ConfigurationError, match="line 2: no setting 'lr'; did you mean rate"):
        load(Bakery, str(file), {})
    file.write_text("oven: o\nglaze: yes\nkind: oat\n")
    with pytest.raises(ConfigurationError, match=r"yaml, line 2: glaze is True, but oat"):
        load(Bakery, str(file), {})


def test_every_field_explains_itself():
    assert list(fields(Bakery)) == [field.name for field in dataclasses.fields(Bakery)]
    assert fields(Bakery)["loaves"].group == "How"
    assert fields(Bakery)["glaze"].flag == "--glaze/--no-glaze"


def test_settings_import_nothing_heavy():
    code = (
        "import sys, duet_unlearn.cli.distill\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
