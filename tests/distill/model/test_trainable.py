"""What is trained: everything, layers, parameters, LoRA."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.model.trainable import select_trained
from duet_unlearn.errors import ConfigurationError, StoppedError


def tensors_of(folder: str | Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / name)


def select(tiny_model: Path, **settings):
    config = RunConfig(cache="c", student=str(tiny_model), out="o", **settings)
    return select_trained(load_model(tiny_model, dtype="float32", trainable=True), config)


def trained_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def message_of(tiny_model: Path, **settings) -> str:
    with pytest.raises(ConfigurationError) as caught:
        select(tiny_model, **settings)
    return str(caught.value)


def test_everything_unless_told(tiny_model):
    model, trained = select(tiny_model)
    assert trained.what == "everything"
    assert trained.parameters == trained.of == sum(p.numel() for p in model.parameters())


def test_chosen_layers_and_parameters(tiny_model):
    model, trained = select(tiny_model, layers="1")
    assert trained_names(model)
    assert all(name.startswith("model.layers.1.") for name in trained_names(model))
    assert trained.parameters == sum(p.numel() for p in model.model.layers[1].parameters())
    assert trained.what == "layers 1"

    model, trained = select(tiny_model, parameters=r"mlp\.(up|down)_proj")
    assert sorted(trained_names(model)) == [
        f"model.layers.{layer}.mlp.{name}_proj.weight"
        for layer in (0, 1)
        for name in ("down", "up")
    ]
    assert trained.what == r"parameters matching mlp\.(up|down)_proj"

    model, trained = select(tiny_model, layers="0-1", parameters="q_proj")
    assert len(trained_names(model)) == 2
    model, trained = select(tiny_model, layers="1", parameters="q_proj")
    assert trained_names(model) == ["model.layers.1.self_attn.q_proj.weight"]
    assert trained.what == "layers 1, parameters matching q_proj"


def test_a_choice_that_means_nothing_is_refused_with_what_there_is(tiny_model):
    assert message_of(tiny_model, layers="1-2") == (
        "layers is '1-2', but the student has layers 0-1; choose among them"
    )
    message = message_of(tiny_model, parameters="qproj")
    assert "'qproj', which no parameter matches; there are " in message
    assert "model.embed_tokens.weight, lm_head.weight, model.layers.N.self_attn" in message
    assert re.search(r"and \d more$|and \d more parameters$", message)
    message = message_of(tiny_model, layers="0", parameters="embed")
    assert "no parameter matches in layers 0; there are model.layers.N." in message
    assert message_of(tiny_model, lora_rank=2, lora_target_modules=("q_proj,qproj",)) == (
        "lora_target_modules is 'qproj', which no linear module is called; there are all-linear, "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    )


def test_tied_weights_are_one_tensor_whatever_name_is_chosen(tiny_model, caplog):
    model, _ = select(tiny_model, parameters="lm_head")
    assert trained_names(model) == ["model.embed_tokens.weight"]
    assert "lm_head.weight and model.embed_tokens.weight are one tied tensor" in caplog.text
    assert "lm_head is tied to the embeddings" in message_of(
        tiny_model, lora_rank=2, lora_target_modules=("lm_head",)
    )


def test_lora_puts_adapters_on_the_linear_modules_of_the_chosen_layers(tiny_model):
    model, trained = select(tiny_model, lora_rank=4)
    names = trained_names(model)
    assert len(names) == 2 * 2 * 7  # A and B, two layers, seven modules
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert "lm_head" not in " ".join(names)
    assert (
        trained.parameters
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
        < 0.5 * trained.of
    )
    model, trained = select(
        tiny_model, lora_rank=4, layers="1", lora_target_modules=("q_proj,v_proj",)
    )
    assert len(trained_names(model)) == 4
    assert all(".layers.1.self_attn." in name for name in trained_names(model))
    assert trained.what == "LoRA of rank 4 on q_proj, v_proj in layers 1"


def test_the_adapter_is_drawn_from_the_seed(tiny_model):
    torch.manual_seed(1)
    one, _ = select(tiny_model, lora_rank=2, seed=3)
    torch.manual_seed(2)
    same, _ = select(tiny_model, lora_rank=2, seed=3)
    other, _ = select(tiny_model, lora_rank=2, seed=4)
    weights = [
        torch.cat([p.flatten() for p in m.parameters() if p.requires_grad])
        for m in (one, same, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_peft_the_error_names_the_extra(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert 'pip install "duet-unlearn[lora]"' in message_of(tiny_model, lora_rank=2)


def test_frozen_weights_stay_and_hold_no_optimizer_state(train, stop_at_pass, tiny_model, tmp_path):
    result = train(layers="1", parameters="mlp")
    base, student = tensors_of(tiny_model), tensors_of(result.out)
    changed = {name for name in base if not torch.equal(base[name], student[name])}
    assert changed == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert result.trained_parameters == sum(base[name].numel() for name in changed)
    card = (Path(result.out) / "README.md").read_text()
    assert f"| trained | layers 1, parameters matching mlp: {result.trained_parameters:,} " in card

    def term() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with stop_at_pass(3, term), pytest.raises(StoppedError):
        train("stopped", layers="1", parameters="mlp")
    checkpoint = tmp_path / "stopped.unfinished" / "checkpoint-3"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == result.trained_parameters
    again = train("stopped", layers="1", parameters="mlp")
    assert all(torch.equal(student[name], t) for name, t in tensors_of(again.out).items())


def test_an_adapter_is_saved_as_one_and_goes_on_where_it_stopped(
    train, stop_at_pass, tiny_model, tmp_path
):
    result = train(lora_rank=4, save_steps=4, learning_rate=1e-2)
    assert all(last < first for first, last in result.loss.values())
    out = Path(result.out)
    assert not (out / "model.safetensors").exists()
    assert not (out / "config.json").exists()
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == str(tiny_model)
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert "LoRA of rank 4 on all-linear, alpha 8, as an adapter of the base" in card

    def die() -> None:
        raise OSError("the machine is gone")

    with stop_at_pass(7, die), pytest.raises(OSError, match="gone"):
        train("killed", lora_rank=4, save_steps=4, learning_rate=1e-2)
    again = train("killed", lora_rank=4, save_steps=4, learning_rate=1e-2)
    one, other = (tensors_of(r.out, "adapter_model.safetensors") for r in (result, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_extrapolation_scales_the_adapter_that_training_made(train, tiny_model):
    plain, scaled = train("plain", lora_rank=4), train("s", lora_rank=4, lora_extrapolation=1.5)
    one, other = (tensors_of(r.out, "adapter_model.safetensors") for r in (plain, scaled))
    assert all(torch.equal(one[name], other[name]) for name in one)
    settings = [json.loads(Path(r.out, "adapter_config.json").read_text()) for r in (plain, scaled)]
    assert [s.pop("lora_alpha") for s in settings] == [8, 12]
    assert settings[0] == settings[1]
    assert "alpha 8, extrapolated by 1.5, as an" in Path(scaled.out, "README.md").read_text()
    assert "extrapolated" not in Path(plain.out, "README.md").read_text()
    whole = train("m", lora_rank=4, lora_extrapolation=1.5, merge=True)
    base, merged = tensors_of(tiny_model), tensors_of(whole.out)
    name = "model.layers.0.mlp.up_proj.weight"
    down, up = (
        next(t for n, t in one.items() if f"layers.0.mlp.up_proj.lora_{part}" in n) for part in "AB"
    )
    torch.testing.assert_close(merged[name] - base[name], 1.5 * 2 * up @ down, rtol=0, atol=1e-4)


def test_a_merged_adapter_is_a_whole_model_that_answers_alike(train, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, merged = train("adapter", lora_rank=4), train("merged", lora_rank=4, merge=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    beside = PeftModel.from_pretrained(base, adapter.out)
    whole = AutoModelForCausalLM.from_pretrained(merged.out)
    assert not (Path(merged.out) / "adapter_config.json").exists()
    assert sum(p.numel() for p in whole.parameters()) == merged.parameters
    ids = torch.tensor([[0, 5, 9, 300]])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, beside(ids).logits, rtol=1e-4, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
    assert (whole(ids).logits - plain).abs().max() > 0.1


def test_gradient_checkpointing_and_a_frozen_base_agree_with_plain_training(train):
    plain = train("plain", lora_rank=4, epochs=1)
    saving = train("saving", lora_rank=4, epochs=1, gradient_checkpointing=True)
    one, other = (tensors_of(r.out, "adapter_model.safetensors") for r in (plain, saving))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
