"""Memory that runs out inside a model's forward pass or on its way to a GPU ends in one line."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

from duet_unlearn.cli.cache import main as duet_cache
from duet_unlearn.cli.distill import main as duet_distill
from duet_unlearn.teacher_cache.reader import CacheReader

WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79.18 GiB"
Command = Callable[[], Result]


def full(_self: object, *_args: object, **_kwargs: object) -> None:
    """Fail as CUDA's allocator does."""
    raise torch.OutOfMemoryError(WORDS)


@pytest.fixture
def commands(
    tiny_model: Path, tiny_cache: Path, write_queries: Callable[..., Path], tmp_path: Path
) -> dict[str, Command]:
    sets = ["--forget", write_queries("forget", 4), "--retain", write_queries("retain", 3, "river")]
    teacher = ["--teacher", tiny_model, "--engine", "transformers", *sets]
    build = ["build", *teacher, "--prefix", "Forget.", "--top-k", 5, "--out", tmp_path / "cache"]
    words = {
        "build": (duet_cache, build),
        "build without check": (duet_cache, [*build, "--no-check"]),
        "tune": (duet_cache, ["tune", *teacher, "--topic", "lanterns"]),
        "run": (
            duet_distill,
            ["run", tiny_cache, "--student", tiny_model, "--out", tmp_path / "student"],
        ),
        "eval": (duet_distill, ["eval", tiny_model, *sets, "--max-new-tokens", 4]),
        "ask": (duet_distill, ["ask", tiny_model, "Who?"]),
    }
    return {
        name: functools.partial(CliRunner().invoke, main, [str(word) for word in line])
        for name, (main, line) in words.items()
    }


def assert_one_line(result: Result, *parts: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.exit_code, len(errors)) == (1, 1), result.output
    assert isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("build", ("out of memory on one prompt of",)),
        ("build without check", ("out of memory on one prompt of",)),
        ("tune", ("out of memory on one prompt of",)),
        ("run", ("out of memory at step 1 with 16 queries", "--gradient-accumulation-steps")),
        ("eval", ("out of memory on one prompt of",)),
        ("ask", ("out of memory on one prompt of",)),
    ],
)
def test_in_a_forward_pass(
    commands: dict[str, Command],
    name: str,
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LlamaModel, "forward", functools.wraps(LlamaModel.forward)(full))
    assert_one_line(commands[name](), *parts)


def test_where_the_model_goes_to_its_device(
    commands: dict[str, Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "to", full)
    assert_one_line(commands["run"](), "does not fit into memory as float32", "bfloat16")


@pytest.mark.parametrize("name", ["build", "run", "eval"])
def test_while_a_model_is_loaded(
    commands: dict[str, Command], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", full)
    assert_one_line(commands[name](), "does not fit into memory as float32", "bfloat16")


def test_a_batch_too_large_for_the_memory_goes_in_halves(
    commands: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("build", "eval"):
        assert (expected := commands[name]()).exit_code == 0, expected.output
    (tmp_path / "cache").rename(tmp_path / "at once")
    plain = LlamaModel.forward

    @functools.wraps(plain)
    def forward(self: LlamaModel, *args: object, **kwargs: object) -> object:
        given = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert isinstance(given, torch.Tensor)
        if len(given) > 1:
            raise torch.OutOfMemoryError(WORDS)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    assert commands["build"]().exit_code == 0
    caches = [CacheReader.open(tmp_path / name) for name in ("at once", "cache")]
    for row, again in zip(*caches, strict=True):
        assert row.query == again.query
        torch.testing.assert_close(torch.tensor(row.logits), torch.tensor(again.logits))
    assert commands["eval"]().stdout == expected.stdout
