"""Adapter folders where a model is expected."""

import json
import shutil
from pathlib import Path

import pytest

from duet_unlearn.data.models.adapters import add_adapter, resolve_with_adapter
from duet_unlearn.data.models.loading import load_model
from duet_unlearn.errors import DataError, MismatchError
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from duet_unlearn.distill.config import RunConfig
    from duet_unlearn.distill.run import run

    out = tmp_path_factory.mktemp("adapter") / "student"
    result = run(
        RunConfig(
            cache=str(tiny_cache),
            student=str(tiny_model),
            out=str(out),
            lora_rank=4,
            learning_rate=3e-2,
            epochs=4,
        )
    )
    return Path(result.out)


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def set_base(adapter: Path, base: str | None) -> None:
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": base}))


def test_an_adapter_is_evaluated_on_its_base(adapter, tiny_model, write_queries, tmp_path):
    merged = add_adapter(load_model(tiny_model), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, tmp_path / "merged")
    report = evaluate(
        EvalConfig(
            models=(
                ModelSpec(label="base", model=str(tiny_model)),
                ModelSpec(label="adapter", model=str(adapter)),
                ModelSpec(label="merged", model=str(tmp_path / "merged")),
            ),
            forget=(str(write_queries("forget", 5)),),
            retain=(str(write_queries("retain", 5, "river")),),
            max_new_tokens=6,
        )
    )
    texts = {label: [r.text for r in rows] for label, rows in report.answers.items()}
    assert texts["adapter"] == texts["merged"]
    assert texts["adapter"] != texts["base"]


def test_a_base_that_is_not_the_adapters_is_refused(copy, tmp_path, tiny_model):
    set_base(copy, str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"adapter .*copy: its base is not here .*no such folder"):
        resolve_with_adapter(str(copy))
    set_base(copy, None)
    with pytest.raises(DataError, match="names no base_model_name_or_path"):
        resolve_with_adapter(str(copy))
    told = json.loads((copy / "duet_run.json").read_text())
    told["base"]["weights"] = "sha256:other"
    (copy / "duet_run.json").write_text(json.dumps(told))
    set_base(copy, str(tiny_model))
    with pytest.raises(MismatchError, match=r"trained on other weights .*\(sha256:other, found"):
        resolve_with_adapter(str(copy))


def test_an_adapter_that_does_not_fit_is_refused(copy, tiny_model):
    from safetensors.torch import load_file, save_file

    path = copy / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[2:]), path)
    with pytest.raises(DataError, match="peft cannot put it into its base .*missing adapter keys"):
        add_adapter(load_model(tiny_model), copy)
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in weights.items()}, path)
    with pytest.raises(DataError, match="peft cannot put it into its base"):
        add_adapter(load_model(tiny_model), copy)


def test_training_starts_from_whole_models_only(adapter, train):
    with pytest.raises(DataError, match=r"an adapter, expected a whole model; merge it"):
        train(student=str(adapter))
