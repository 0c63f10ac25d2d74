"""Rounded weights, against rounding by hand; the demo world's model still knows with them."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.models.quantization import quantize_weights
from duet_unlearn.errors import ConfigurationError, RequirementError
from duet_unlearn.evaluation.config import EvalConfig, parse_models
from duet_unlearn.evaluation.evaluate import evaluate
from duet_unlearn.evaluation.report.overview import make_overview
from duet_unlearn.evaluation.report.sources import Sources
from duet_unlearn.evaluation.report.verdict import judge, not_tested
from duet_unlearn.evaluation.requirements import check_requirements


def assert_rounded(found: torch.Tensor, weight: torch.Tensor, group: int, most: int) -> None:
    """Each group of a row has 2 * most + 2 evenly spaced levels, and the nearest are taken."""
    found, weight = (w.reshape(w.shape[0], -1, group) for w in (found, weight))
    step = weight.abs().amax(-1, keepdim=True) / most
    assert not torch.equal(found, weight)
    # Half a step from the nearest level; a whole one at the end where there is one level less.
    assert ((found - weight).abs() <= 1.05 * step).all()
    assert ((found - weight).abs() <= 0.52 * step).float().mean() > 0.97
    for row in found[:8].reshape(-1, group):
        levels = row.unique()
        assert len(levels) <= 2 * most + 2
        gaps = levels.diff()
        counts = gaps / gaps.min()
        assert (counts - counts.round()).abs().max() < 0.05


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model(world.MODEL)


@pytest.mark.parametrize(("scheme", "group", "most"), [("int8", 192, 127), ("int4", 64, 7)])
def test_each_linear_module_is_rounded_and_nothing_else(
    model: nn.Module, scheme: str, group: int, most: int
) -> None:
    pytest.importorskip("torchao")
    quantized = copy.deepcopy(model)
    assert quantize_weights(quantized, scheme) == 4 * 7
    inputs = torch.eye(192)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        found = quantized.get_submodule(name)
        if name == "lm_head":
            assert found.weight is quantized.get_input_embeddings().weight  # tied as before
            assert torch.equal(found.weight, module.weight)
        elif module.in_features == 192:
            with torch.no_grad():
                weight = found(inputs).T
            assert_rounded(weight, module.weight.detach(), group, most)


def test_rows_with_rounded_weights_stand_beside_the_others(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = EvalConfig(
        models=parse_models([f"base={world.MODEL}", f"student={world.MODEL}"]),
        forget=(str(world.FORGET_HELDOUT),),
        retain=(str(world.RETAIN_HELDOUT),),
        prefix=world.PREFIX,
        topic=world.TOPIC,
        quantize=("int8", "int4", "int8"),
        limit=8,
        max_new_tokens=12,
        require="forget<5",
    )
    report = evaluate(config)
    assert report.labels == (
        *("base", "base + prefix", "base int8", "base int4"),
        *("student", "student int8", "student int4"),
    )
    assert report.mean("base + prefix", split="forget") < 10
    assert report.mean("student int8", split="forget") == pytest.approx(100.0)
    assert report.mean("student int4", split="forget") > 50
    document = report.to_json()
    assert [row["quantized"] for row in document["models"][4:]] == [None, "int8", "int4"]
    assert document["versions"]["torchao"]
    # A gate holds the rounded student to it, too; no verdict is passed on the rounded base.
    verdicts = judge(document, make_overview(document, Sources()))
    assert [verdict["model"] for verdict in verdicts] == ["student", "student int8", "student int4"]
    assert "quantized" not in not_tested(document, stress_tests={"relearning"})
    with pytest.raises(RequirementError, match="student int4: forget is"):
        check_requirements("forget<5", report)


def test_what_cannot_be_rounded_is_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="quantize is 'int3', expected int8 or int4"):
        EvalConfig(models=parse_models(["m"]), forget=("f",), retain=("r",), quantize=("int3",))
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigurationError, match=r"needs torchao.*duet-unlearn\[quantize\]"):
        quantize_weights(load_model(tiny_model), "int4")


def test_another_engine_and_rounded_weights_exclude_each_other(tiny_model: Path) -> None:
    config = EvalConfig(
        models=parse_models([str(tiny_model)]), forget=("f",), retain=("r",), quantize=("int8",)
    )
    with pytest.raises(ConfigurationError, match="quantize needs --engine transformers"):
        evaluate(config, respond=lambda *_: iter(()))
