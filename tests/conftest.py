"""Fixtures shared by all tests: a tiny random model and query files."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait slow everything down on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Jobs in the background of a script start with Ctrl-C ignored, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="session", autouse=True)
def _own_fingerprint_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Fingerprints of throw-away models must not fill the user's memory of them.
    os.environ["DUET_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache-home"))


def make_tiny_model(folder: Path, *, seed: int = 0, vocab_size: int = 384, width: int = 64) -> Path:
    """Save a random two-layer Llama with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "who what where is the keeper of a lantern river tower named forgot answer question"
    tokenizer.train_from_iterator([words, f"the {words}"] * 8, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 384 tokens and 256 positions; never changed by a test."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


WriteQueries = Callable[..., Path]


@pytest.fixture
def write_queries(tmp_path: Path) -> WriteQueries:
    """Write a JSONL query file of `count` invented queries; return its path."""

    def write(name: str, count: int, word: str = "lantern", *, answers: bool = True) -> Path:
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"id": f"{name}-{i}", "query": f"Who is the keeper of {word} {i}?"}
            | ({"answer": f"secret{i} of {word}"} if answers else {})
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
