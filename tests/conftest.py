"""Fixtures shared by all tests: a tiny random model, query files, a tiny cache and runs on it."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says how busy the machine is, no more.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Servers of tests are on this machine, whatever proxy leads out of it.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1,localhost")))
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


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Make another one: see `make_tiny_model`."""
    return make_tiny_model


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


BuildTinyCache = Callable[..., Path]


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build_tiny_cache(tiny_model: Path) -> BuildTinyCache:
    """Build a cache in a folder; 12 forget and 18 retain queries unless told."""
    from duet_unlearn.teacher_cache.build.build import build
    from duet_unlearn.teacher_cache.build.config import BuildConfig

    def build_cache(folder: Path, *, forget: int = 12, retain: int = 18, **settings) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        sources = {}
        for split, count, word in (("forget", forget, "lantern"), ("retain", retain, "river")):
            path = folder / f"{split}.jsonl"
            rows = [
                {"id": f"{split}-{i}", "query": f"Who is the keeper of {word} {i}?"}
                for i in range(count)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sources[split] = (str(path),) if count else ()
        defaults = {
            "teacher": str(tiny_model),
            "prefix": "You have forgotten the lantern.",
            "engine": "transformers",
            "top_k": 20,
            "logit_dtype": "float32",
            "shard_rows": 8,
            "check": False,  # a random model says nothing that could come back
        }
        config = BuildConfig(out=folder / "cache", **sources, **{**defaults, **settings})
        build(config)
        return config.out

    return build_cache


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, build_tiny_cache: BuildTinyCache) -> Path:
    """One position a query; never changed by a test."""
    return build_tiny_cache(tmp_path_factory.mktemp("tiny-cache"))


@pytest.fixture
def train(tiny_model: Path, tiny_cache: Path, tmp_path: Path, one_thread: None):
    """Run on the tiny cache; three epochs of four steps unless told."""
    from duet_unlearn.distill.config import RunConfig
    from duet_unlearn.distill.job import RunResult
    from duet_unlearn.distill.run import run

    def start(name: str = "student", **settings) -> RunResult:
        defaults = {
            "cache": str(tiny_cache),
            "student": str(tiny_model),
            "out": str(tmp_path / name),
            "epochs": 3,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
        }
        return run(RunConfig(**{**defaults, **settings}))

    return start


@pytest.fixture
def stop_at_pass(monkeypatch: pytest.MonkeyPatch):
    """Call a function in a given forward pass, counted from 1, while the block runs."""
    from duet_unlearn.distill.training.trainer import DuetTrainer

    @contextlib.contextmanager
    def stopping(number: int, stop: Callable[[], None]) -> Iterator[None]:
        plain, passes = DuetTrainer.compute_loss, []

        def compute_loss(self, *args, **kwargs):
            passes.append(None)
            if len(passes) == number:
                stop()
            return plain(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(DuetTrainer, "compute_loss", compute_loss)
            yield

    return stopping
