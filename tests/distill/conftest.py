"""A tiny cache, built by the real builder from the tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

BuildTinyCache = Callable[..., Path]


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
