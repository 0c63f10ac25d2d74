"""Sampled answers: from the right distribution, the same for the same seed, with raw logits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from duet_unlearn.data import demo_world as world
from duet_unlearn.data.messages import asked_text, split_view
from duet_unlearn.data.queries import Query
from duet_unlearn.distill.model.student import check_cache_fits, open_student
from duet_unlearn.errors import ConfigurationError, CorruptCacheError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.plan import Part
from duet_unlearn.teacher_cache.diff import diff
from duet_unlearn.teacher_cache.engines.sampling import draw_tokens, uniforms
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.merge import merge
from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader
from duet_unlearn.teacher_cache.verify import verify


def test_draws_come_in_the_distribution_s_proportions() -> None:
    logits_V = torch.tensor([0.0, -1.0, 2.0, -torch.inf, 1.5])
    uniform_N = (np.arange(10_000) + 0.5) / 10_000

    for temperature in (0.5, 1.0, 3.0):
        tokens = draw_tokens(logits_V.expand(10_000, -1), uniform_N, temperature)
        share = torch.bincount(tokens, minlength=5) / 10_000
        torch.testing.assert_close(share, (logits_V / temperature).softmax(0), atol=2e-4, rtol=0)
    coldest = draw_tokens(logits_V.expand(9, -1), uniforms(3, 9), 1e-300)
    assert coldest.tolist() == [2] * 9
    assert uniforms(7, 3).tolist() == uniforms(7, 9)[:3].tolist()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    source = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    lines = world.RETAIN.read_text().splitlines()[:6]
    source.write_text("\n".join(lines) + "\n")
    return {
        "teacher": str(world.MODEL),
        "prefix": None,
        "train": (str(source),),
        "engine": "transformers",
        "top_k": 20,
        "positions": 6,
        "logit_dtype": "float32",
        "temperature": 2.0,
        "samples": 3,
    }


Make = Callable[..., dict[tuple[str, str], CachedRow]]


@pytest.fixture
def make(settings: dict[str, Any], tmp_path: Path) -> Make:
    def made(name: str, **changes: Any) -> dict[tuple[str, str], CachedRow]:
        config = BuildConfig(**{**settings, **changes}, out=tmp_path / name)
        manifest = build(config).manifest
        rows = list(CacheReader.open(tmp_path / name))
        assert len(rows) == manifest.num_rows
        return {(row.query_id, row.query): row for row in rows}

    return made


def responses(rows: dict[tuple[str, str], CachedRow]) -> dict[tuple[str, str], list[int]]:
    return {key: row.response_ids.tolist() for key, row in rows.items()}


def test_samples_are_rows_with_raw_logits_along_their_own_tokens(
    make: Make, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    rows = make("cache")

    assert len(rows) == 18
    assert verify(tmp_path / "cache").problems == ()
    asked = {asked_text(text) for _, text in rows}
    assert len(asked) == 6
    assert asked == {text for query_id, text in rows if "~" not in query_id}
    assert all(split_view(text)[0] is None for _, text in rows)
    teacher = AutoModelForCausalLM.from_pretrained(world.MODEL)
    for row in rows.values():
        ids = np.concatenate([row.prompt_ids, row.response_ids[:-1]]).astype(np.int64)
        with torch.no_grad():
            logits = teacher(torch.from_numpy(ids)[None]).logits[0, len(row.prompt_ids) - 1 :]
        np.testing.assert_allclose(row.logits, logits.topk(20).values, atol=1e-3)
        np.testing.assert_allclose(row.logsumexp, logits.logsumexp(-1), atol=1e-3)
    # At this temperature most answers differ, and many tokens are not the strongest.
    said = [tuple(ids) for ids in responses(rows).values()]
    assert len(set(said)) > 12
    assert any((row.response_ids != row.token_ids[:, 0]).any() for row in rows.values())
    # A student takes the rows as prompts that it would render itself.
    student = open_student(str(world.MODEL))
    from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer

    renderer = PromptRenderer(load_tokenizer(world.MODEL))
    check_cache_fits(replace(student, weights="sha256:" + "00" * 32), renderer, _open(tmp_path))


def _open(folder: Path) -> CacheReader:
    return CacheReader.open(folder / "cache")


def test_the_same_seed_draws_the_same_however_the_work_is_cut(make: Make, tmp_path: Path) -> None:
    rows = responses(make("cache"))

    small = make("small", shard_rows=4, engine_args={"batch_rows": 2})
    parts = [make(f"part-{n}", part=Part(count=2, number=n)) for n in (1, 2)]
    # A build that stopped after some shards goes on where it was.
    resumed = tmp_path / "small"
    (resumed / "manifest.json").unlink()
    for path in sorted((resumed / "shards").iterdir())[1::2]:
        path.unlink()
    again = make("small", shard_rows=4)

    assert rows == responses(small) == responses(again) == responses({**parts[0], **parts[1]})
    merged = merge([str(tmp_path / f"part-{n}") for n in (1, 2)], tmp_path / "merged")
    assert merged.manifest.num_rows == 18
    assert diff(str(tmp_path / "cache"), str(tmp_path / "merged"))["same"]


def test_caches_differ_where_their_samples_do(make: Make, tmp_path: Path) -> None:
    rows = responses(make("cache"))
    others = {
        "seed": make("seed", seed=1),
        "temperature": make("temperature", temperature=0.7),
        "scored": make("greedy", temperature=0.0, samples=1),
    }

    recipes = {
        name: CacheReader.open(tmp_path / name).manifest.recipe
        for name in ("cache", "seed", "temperature", "greedy")
    }
    assert len({recipe.recipe_id for recipe in recipes.values()}) == 4
    assert "seed" not in recipes["cache"].to_json()
    assert "temperature" not in recipes["greedy"].to_json()
    assert diff(str(tmp_path / "cache"), str(tmp_path / "seed"))["recipe"] == ["seed: None / 1"]
    for other in others.values():
        common = rows.keys() & other.keys()
        assert any(rows[key] != responses(other)[key] for key in common)
    # More samples are more rows of the same recipe, and take over those that are there.
    config_reuse = (str(tmp_path / "cache"),)
    more = make("more", samples=4, reuse=config_reuse)
    assert len(more) == 24
    assert rows.items() <= responses(more).items()
    fewer = make("fewer", samples=1)
    assert responses(fewer).items() <= rows.items()
    assert CacheReader.open(tmp_path / "fewer").manifest.recipe_id == recipes["cache"].recipe_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix": "Forget.", "train": (), "retain": ("a",)}, "--temperature samples the answers"),
        ({"train": (), "responses": ("a.jsonl",)}, "--temperature samples the answers"),
        ({"temperature": 0.0}, "without --temperature answers are greedy"),
        ({"temperature": 0.0, "samples": 1, "seed": 3}, "without --temperature answers are greedy"),
        ({"temperature": -1.0}, "0 or more"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BuildConfig(**{**settings, **changes}, out=tmp_path / "cache")


@pytest.mark.parametrize(
    "entries",
    [
        {"temperature": 0.0},
        {"temperature": 1e9},
        {"temperature": "1"},
        {"seed": -1},
        {"seed": 1 << 31},
        {"seed": 0},
        {"temperature": None, "seed": 1},
        {"scored": None},
    ],
)
def test_a_foreign_recipe_that_samples_oddly_is_refused(
    entries: dict[str, Any],
) -> None:
    recipe = {
        **dict.fromkeys(("weights", "config", "tokenizer", "vocabulary"), "sha256:" + "ab" * 32),
        **{"vocab_size": 90, "chat_template": None, "template_date": "2024-07-26", "prefix": ""},
        **{"prefix_place": "system", "retain_prefix": True, "top_k": 4, "positions": 2},
        **{"logit_dtype": "float16", "compute_dtype": "float32", "eos_token_ids": [1]},
        **{"scored": "assistant", "temperature": 0.5, "seed": 7},
    }
    assert Recipe.from_json(recipe).version == 2
    changed = {k: v for k, v in {**recipe, **entries}.items() if v is not None or k not in entries}
    with pytest.raises((CorruptCacheError, ConfigurationError)):
        Recipe.from_json(changed)


def test_no_query_reads_as_a_sample_of_another() -> None:
    query = Query.from_text("who", split="train")
    further = query.as_sample(2)
    typed = Query.from_text(further.text, split="train")
    assert (asked_text(further.text), query.as_sample(1)) == ("who", query)
    assert len({query.text, further.text, typed.text}) == 3
    assert asked_text(typed.text) == typed.text
    assert json.loads(typed.text)[0]["content"] == further.text
