"""Loading a model folder, for answering and for training."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from duet_unlearn.data.models import loading
from duet_unlearn.data.models.folder import resolve_model_folder
from duet_unlearn.data.models.loading import fastest_dtype, load_model
from duet_unlearn.data.models.tokenizer import load_tokenizer
from duet_unlearn.errors import DataError


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def store_as(folder: Path, dtype: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))


def test_a_model_answers_in_evaluation_mode_and_trains_as_it_is(tiny_model: Path) -> None:
    answering = load_model(tiny_model)
    assert not answering.training
    assert answering.dtype == torch.float32
    trained = load_model(tiny_model, dtype="bfloat16", trainable=True)
    assert trained.dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes every dtype as it is stored")
def test_half_precision_is_taken_where_it_is_stored_and_fast(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast in (False, True):
        monkeypatch.setattr(loading, "_cpu_has_bfloat16", lambda fast=fast: fast)
        found = {}
        for stored in ("float32", "float16", "bfloat16"):
            store_as(copy, stored)
            found[stored] = fastest_dtype(copy)
        half = "bfloat16" if fast else "float32"
        assert found == {"float32": "float32", "float16": "float32", "bfloat16": half}


def test_a_model_that_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(DataError, match="transformers cannot load it") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_end_early_are_named(copy: Path) -> None:
    os.truncate(copy / "model.safetensors", 1000)
    with pytest.raises(DataError, match="transformers cannot load it") as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    removed = next(name for name in sorted(weights) if "q_proj" in name)
    del weights[removed]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for trainable in (False, True):
        with pytest.raises(DataError, match=f"1 weights are missing .* {removed}"):
            load_model(copy, trainable=trainable)


@pytest.mark.parametrize("beside", [None, "consolidated.safetensors"])
def test_a_pickle_is_never_read(copy: Path, tmp_path: Path, beside: str | None) -> None:
    weights, trap = copy / "model.safetensors", tmp_path / "unpickled"
    if beside:
        weights.rename(copy / beside)
    else:
        weights.unlink()
    (copy / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {trap}'\ntR.".encode())
    with pytest.raises(DataError, match="safetensors"):
        load_model(resolve_model_folder(str(copy)))
    assert not trap.exists()


def test_code_of_a_model_does_not_run_unless_asked_for(copy: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (copy / "x.py").write_text(f"open({str(trap)!r}, 'w')\nclass X: pass\n")
    for name, changes in {
        "config.json": {
            "model_type": "x",
            "auto_map": {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.X"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "X",
            "auto_map": {"AutoTokenizer": [None, "x.X"]},
        },
    }.items():
        value = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**value, **changes}))
    for load in (load_model, load_tokenizer):
        with pytest.raises(DataError):
            load(copy)
    assert not trap.exists()
