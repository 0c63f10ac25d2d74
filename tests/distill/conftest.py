"""A tiny cache, built by the real builder from the tiny model, and runs on it."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
    from duet_unlearn.teacher_cache.build import build
    from duet_unlearn.teacher_cache.build_config import BuildConfig

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
    from duet_unlearn.distill.run import RunResult, run

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
    from duet_unlearn.distill.trainer import DuetTrainer

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
