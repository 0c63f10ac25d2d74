"""A batch as a tree of tokens: the same scores from fewer tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from duet_unlearn.distill.batches.dataset import Example, collate
from duet_unlearn.distill.model import token_tree
from duet_unlearn.distill.model.sparse_head import StudentScores
from duet_unlearn.distill.model.token_tree import may_merge, merge

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


def llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings))


def eager() -> nn.Module:
    return llama(attn_implementation="eager")


def recomputing() -> nn.Module:
    model = llama().train()
    model.gradient_checkpointing_enable()
    return model


def capped() -> nn.Module:
    """A model whose logits are more than its head's output."""
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


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


def opt() -> nn.Module:
    """A model whose positions have an offset."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": HIDDEN, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, **sizes, **layers))


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


@pytest.mark.parametrize(
    "make",
    [llama, eager, qwen2, gpt2, adapted, recomputing, capped],
    ids=lambda make: make.__name__,
)
def test_a_tree_gives_the_scores_and_gradients_of_the_padded_batch(
    make: Callable[[], nn.Module], batch: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    # Eager attention overflows to infinity in float64: its softmax is in float32.
    model = make() if make is eager else make().double()
    scores, gradient, tokens = scores_and_gradient(model, batch)
    monkeypatch.setattr(token_tree, "MOST_TOKENS", 0)
    padded, expected, all_tokens = scores_and_gradient(model, batch)
    assert all_tokens == batch["input_ids"].numel()
    distinct = {
        tuple(row[start : end + 1])
        for row, start in zip(batch["input_ids"].tolist(), starts(batch), strict=True)
        for end in range(start, len(row))
    }
    assert tokens <= len(distinct) < all_tokens / 2
    close = 1e-4 if make is eager else 1e-6
    torch.testing.assert_close(scores, padded, rtol=close, atol=close)
    # Rotary angles are computed in float32 whatever the model's type.
    assert float((gradient - expected).norm() / expected.norm()) < 10 * close


def starts(batch: dict) -> list[int]:
    """Return the column of each row's first token."""
    return batch["attention_mask"].argmax(dim=1).tolist()


@pytest.mark.parametrize("make", [sliding, opt], ids=lambda make: make.__name__)
def test_what_does_not_read_a_tree_reads_rows_or_agrees(
    make: Callable[[], nn.Module], batch: dict
) -> None:
    torch.manual_seed(0)
    model = make().double()
    scores, *_ = scores_and_gradient(model, batch)
    plain = StudentScores(model, tail=False, lean=False)(model, batch)[batch["position_mask"]]
    torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_merges_nothing(batch: dict) -> None:
    assert scores_and_gradient(sliding(), batch)[2] == batch["input_ids"].numel()


@pytest.mark.parametrize(("kinds", "may"), [(["global"], True), (["global", "local"], False)])
def test_layers_of_gpt_neo_that_see_a_window_merge_nothing(kinds: list[str], may: bool) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"hidden_size": HIDDEN, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    attention = [[kinds, 2 // len(kinds)]]
    model = GPTNeoForCausalLM(
        GPTNeoConfig(**sizes, attention_types=attention, attn_implementation="eager")
    )
    assert may_merge(model) is may


def test_a_student_that_heeds_no_positions_is_found_out(
    batch: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    inner = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: inner(*a, **{**k, "position_ids": None})
    )
    scores = StudentScores(model, tail=False)
    scores(model, batch)
    assert not scores._merges


def test_a_tree_by_hand() -> None:
    tree = merge(
        {
            "input_ids": torch.tensor([[0, 5, 6, 7], [5, 6, 8, 9], [5, 6, 7, 0]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]),
            "position_mask": torch.tensor([[True, True], [True, True], [True, False]]),
        }
    )
    assert tree is not None
    assert tree.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    # 6 and 7 of the first row, 8 and 9 of the second, 7 of the third.
    assert tree.columns.tolist() == [1, 2, 3, 4, 2]
    assert tree.sees[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
