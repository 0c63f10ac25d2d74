"""A batch in groups that share the beginnings of prompts: the same scores from fewer tokens."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from duet_unlearn.distill.batches.dataset import Example, collate
from duet_unlearn.distill.model import prompt_groups
from duet_unlearn.distill.model.prompt_groups import PromptGroup, group_prompts
from duet_unlearn.distill.model.sparse_head import StudentScores

VOCABULARY, TOP_K, HIDDEN = 211, 4, 32
HEADER = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
EXAMPLES = (*HEADER, *range(30, 60))
PROMPTS = (
    (*HEADER, 100, 101),
    (*EXAMPLES, 100, 101, 102),
    (*HEADER, 103, 104, 105, 106, 107),
    (*EXAMPLES, 108),
    (200, 201, 202),
    (*HEADER, 109, 110, 111),
)
POSITIONS = (1, 3, 2, 1, 2, 1)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 128}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **off))


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide all other gradients
            nn.init.normal_(parameter)
    return model


def sliding() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))


@pytest.fixture
def batch() -> dict:
    generator = np.random.default_rng(5)
    return collate(
        [
            Example(
                name=str(number),
                split=0,
                weight=1.0,
                prompt_ids=np.array(prompt, np.int32),
                response_ids=generator.integers(0, VOCABULARY, count).astype(np.int32),
                token_ids=np.sort(
                    generator.permuted(np.tile(np.arange(VOCABULARY), (count, 1)), axis=1)[
                        :, :TOP_K
                    ]
                ),
                logits=np.zeros((count, TOP_K), np.float32),
                logsumexp=np.zeros(count, np.float32),
            )
            for number, (prompt, count) in enumerate(zip(PROMPTS, POSITIONS, strict=True))
        ]
    )


def scores_and_gradient(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor, int]:
    """Return the scores of what counts, a gradient of all parameters, and the tokens computed."""
    tokens = 0

    def count(_module: nn.Module, arguments: tuple[Tensor], _output: Tensor) -> None:
        nonlocal tokens
        tokens += arguments[0].numel()

    scores_of = StudentScores(model, tail=False)
    scores_of(model, batch)  # the first call tries whether the head may be lean
    hook = model.get_input_embeddings().register_forward_hook(count)
    scores = scores_of(model, batch)[batch["position_mask"]]
    hook.remove()
    model.zero_grad()
    (scores**2).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return scores.detach(), torch.cat(gradients), tokens


@pytest.mark.parametrize("make", [llama, qwen2, gpt2, adapted], ids=lambda make: make.__name__)
def test_groups_give_the_scores_and_gradients_of_the_padded_batch(
    make: Callable[[], nn.Module], batch, monkeypatch
):
    torch.manual_seed(0)
    model = make().double()
    monkeypatch.setattr(prompt_groups, "PASS_TOKENS", {"cpu": 2})
    scores, gradient, tokens = scores_and_gradient(model, batch)
    monkeypatch.setattr(prompt_groups, "PASS_TOKENS", {"cpu": 10**6})
    padded, expected, all_tokens = scores_and_gradient(model, batch)
    assert all_tokens == batch["input_ids"].numel()
    assert tokens < all_tokens / 2
    torch.testing.assert_close(scores, padded, rtol=1e-6, atol=1e-6)
    # Rotary angles are computed in float32 whatever the model's type.
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_a_sliding_window_and_recomputed_activations_share_nothing(batch, monkeypatch):
    monkeypatch.setattr(prompt_groups, "PASS_TOKENS", {"cpu": 2})
    recomputing = llama()
    recomputing.gradient_checkpointing_enable()
    for model in (sliding(), recomputing):
        assert scores_and_gradient(model, batch)[2] == batch["input_ids"].numel()


def test_the_cheapest_groups_by_hand():
    # Together 2 x 12 columns; apart 12 + 3, and a second pass for 1; sharing would save nothing.
    prompts = [list(range(10)), [50]]
    assert group_prompts(prompts, [12, 3], pass_tokens=1) == [
        PromptGroup((1,), 0),
        PromptGroup((0,), 0),
    ]
    assert group_prompts(prompts, [12, 3], pass_tokens=10) == [PromptGroup((1, 0), 0)]


def test_what_is_shared_ends_before_the_first_scored_position():
    same = [[1, 2, 3, 4, 5, 6]] * 3
    assert group_prompts(same, [7, 7, 7], pass_tokens=0) == [PromptGroup((0, 1, 2), 6)]
