"""Kept tokens that are drawn: an estimate without bias, the same for the same seed, checked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from duet_unlearn.data import demo_world as world
from duet_unlearn.distill.losses import Loss, scores_of
from duet_unlearn.errors import ConfigurationError, CorruptCacheError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.plan import Part
from duet_unlearn.teacher_cache.diff import diff
from duet_unlearn.teacher_cache.engines.sampling import sample_top_k
from duet_unlearn.teacher_cache.format.quarantine import find_problems
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.inspect import render_summary, summarize
from duet_unlearn.teacher_cache.merge import draws_agree, merge
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify

K = 20


def shares(ids_BK: torch.Tensor, logits_BK: torch.Tensor, width: int) -> torch.Tensor:
    """Each row's shares over the vocabulary, `[B, V]` float64."""
    draws = logits_BK.double().exp()
    return torch.zeros(len(ids_BK), width, dtype=torch.float64).scatter_add(
        1, ids_BK.long(), draws / draws.sum(dim=1, keepdim=True)
    )


def test_draws_are_a_token_s_share_rounded_down_or_up_and_right_on_average() -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(50) * 3
    logits_V[7], logits_V[8] = -torch.inf, logits_V[9]
    grid = (np.arange(2000) + 0.5) / 2000

    ids, logits, logsumexp = sample_top_k(logits_V.expand(2000, -1), grid, K)

    assert (ids.dtype, logits.dtype, logsumexp.dtype) == (torch.int32, torch.float32, torch.float32)
    found, wanted = shares(ids, logits, 50), logits_V.double().softmax(dim=0)
    torch.testing.assert_close(found.mean(dim=0), wanted, atol=1e-4, rtol=0)
    assert (K * (found - wanted)).abs().max() < 1 + 1e-6
    assert not (ids == 7).any()
    torch.testing.assert_close(logsumexp.exp(), torch.full((2000,), float(K)))
    torch.testing.assert_close(logits.exp().sum(dim=1), torch.full((2000,), float(K)))


def test_even_draws_are_less_noisy_than_independent_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted_BV = (3 * torch.randn(400, 300, generator=generator)).double().softmax(dim=-1)
    logits_BV, uniform_B = wanted_BV.log().float(), torch.rand(400, generator=generator)

    ids, logits, _ = sample_top_k(logits_BV, uniform_B, 100)

    drawn = torch.multinomial(wanted_BV, 100, replacement=True, generator=generator)
    independent = torch.zeros_like(wanted_BV).scatter_add_(
        1, drawn, torch.full((400, 100), 0.01, dtype=torch.float64)
    )
    noise = [
        (found - wanted_BV).norm(dim=1).mean() for found in (shares(ids, logits, 300), independent)
    ]
    assert noise[0] < 0.6 * noise[1]


def test_tokens_stand_by_descending_draws_and_empty_places_behind_them() -> None:
    # Shares of 1/4, 1/2, 0 and 1/4; and one token with everything.
    logits = torch.tensor([[0.0, np.log(2), -torch.inf, 0.0], [0.0, 50.0, 0.0, 0.0]])

    ids, draws, _ = sample_top_k(logits, [0.5, 0.5], 4)

    assert ids.tolist() == [[1, 0, 3, 1], [1, 1, 1, 1]]
    assert draws.exp().round().tolist() == [[2, 1, 1, 0], [4, 0, 0, 0]]
    assert draws[0, 3] == -torch.inf
    broken = logits.clone()
    broken[1, 2] = torch.nan
    assert sample_top_k(broken, [0.5, 0.5], 4)[2].isnan().tolist() == [False, True]


def make(out: Path, **changes: Any) -> CacheReader:
    queries = out.parent / "queries.jsonl"
    queries.write_text("\n".join(world.RETAIN.read_text().splitlines()[:9]) + "\n")
    settings: dict[str, Any] = {
        "teacher": str(world.MODEL),
        "prefix": None,
        "train": (str(queries),),
        "engine": "transformers",
        "keep": "sampled",
        "top_k": K,
        "positions": 4,
        "temperature": 2.0,
        "shard_rows": 4,
        "out": out,
    }
    build(BuildConfig(**{**settings, **changes}))
    return CacheReader.open(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    make(folder / "cache")
    return folder


def test_a_cache_holds_draws_from_the_teacher_s_distribution(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    reader = CacheReader.open(folder / "cache")

    assert verify(folder / "cache").problems == ()
    assert reader.manifest.recipe.version == 3
    teacher = AutoModelForCausalLM.from_pretrained(world.MODEL)
    kept = []
    for row in reader:
        ids = np.concatenate([row.prompt_ids, row.response_ids[:-1]]).astype(np.int64)
        with torch.no_grad():
            logits_TV = teacher(torch.from_numpy(ids)[None]).logits[0, len(row.prompt_ids) - 1 :]
        draws = np.exp(row.logits.astype(np.float64))
        np.testing.assert_allclose(draws.sum(axis=1), K, rtol=1e-3)
        np.testing.assert_allclose(draws, draws.round(), rtol=1e-3)
        np.testing.assert_allclose(row.logsumexp, np.log(K), rtol=1e-6)
        wanted = logits_TV.double().softmax(dim=-1)
        found = shares(torch.tensor(row.token_ids), torch.tensor(row.logits), wanted.shape[1])
        assert (K * (found - wanted)).abs().max() < 1.05
        kept += (draws > 0).sum(axis=1).tolist()
    assert len(set(kept)) > 2
    table = pq.read_table(folder / "cache/shards")
    assert table["counts"].combine_chunks().flatten().to_pylist() == kept


def test_greedy_and_given_responses_are_what_they_are_without_draws(tmp_path: Path) -> None:
    given = tmp_path / "given.jsonl"
    given.write_text('{"text": "the keeper of the lantern tower is a quiet person"}\n')
    for source in (
        {"temperature": 0.0},
        {"responses": (str(given),), "train": (), "temperature": 0.0},
    ):
        name = f"of-{len(source)}"
        drawn = make(tmp_path / f"drawn-{name}", **source)
        plain = make(tmp_path / f"plain-{name}", **source, keep="strongest")
        for ours, theirs in zip(drawn, plain, strict=True):
            np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
        assert drawn.manifest.recipe_id != plain.manifest.recipe_id


def test_the_same_seed_draws_the_same_however_the_work_is_cut(folder: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        make(tmp_path / f"part-{number}", part=Part(count=2, number=number))
    merge([str(tmp_path / f"part-{n}") for n in (1, 2)], tmp_path / "merged")
    make(tmp_path / "small", shard_rows=2, engine_args={"batch_rows": 1})
    for other in ("merged", "small"):
        assert diff(str(folder / "cache"), str(tmp_path / other))["same"]
        rows = zip(
            CacheReader.open(folder / "cache"), CacheReader.open(tmp_path / other), strict=True
        )
        assert all((a.token_ids == b.token_ids).all() for a, b in rows)
    # Greedy answers, so that rows differ in the kept tokens alone.
    seeds = [make(tmp_path / f"seed-{n}", seed=n, temperature=0.0) for n in (0, 1)]
    assert any((a.token_ids != b.token_ids).any() for a, b in zip(*seeds, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_draws_agree_as_far_as_rounding_lets_them(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = 3 * torch.randn(30, 2000, generator=generator)
    rounding = {"float32": 2.0**-20, "bfloat16": 2.0**-9}[dtype]
    noise = 1 + rounding * torch.randn(logits_TV.shape, generator=generator)
    uniform_T = torch.rand(30, generator=generator)

    def drawn(logits: torch.Tensor) -> Signal:
        ids, draws, logsumexp = (part.numpy() for part in sample_top_k(logits, uniform_T, 200))
        response = np.zeros(30, np.int32)
        return Signal(response_ids=response, token_ids=ids, logits=draws, logsumexp=logsumexp)

    relative = {"float32": 2.0**-13, "bfloat16": 2.0**-6}[dtype]
    one, same = drawn(logits_TV), drawn(logits_TV * noise)
    assert any((a != b).any() for a, b in zip(one.token_ids, same.token_ids, strict=True))
    assert draws_agree(one, same, relative)
    other = logits_TV.clone()
    other[3, 7] = 20.0
    assert not draws_agree(one, drawn(other), relative)
    assert not draws_agree(one, replace(one, response_ids=one.response_ids + 1), relative)


def test_what_a_cache_says_of_itself(folder: Path) -> None:
    summary = summarize(folder / "cache")
    assert summary["bytes_per_logit"] is None
    assert f"what {K} draws a position find" in render_summary(summary)
    card = (folder / "cache/README.md").read_text()
    assert "Sampled tokens of a language model" in card
    assert "ln of how often drawn" in card
    assert "tokens drawn most often" in render_summary(summary)
    assert f"those that {K} draws find" in card


def test_the_loss_is_the_divergence_from_the_shares(folder: Path) -> None:
    reader = CacheReader.open(folder / "cache")
    width = reader.manifest.recipe.vocab_size
    torch.manual_seed(0)
    for row in reader:
        student_TV = torch.randn(len(row.response_ids), width, requires_grad=True)
        ids_TK = torch.from_numpy(row.token_ids.astype(np.int64))
        logits_TK, logsumexp_T = torch.tensor(row.logits), torch.tensor(row.logsumexp)
        loss = Loss(name="kl-tail")(
            scores_of(student_TV, ids_TK, tail=True), logits_TK, logsumexp_T
        ).sum()
        known_TV = shares(ids_TK, logits_TK, width).float()
        entropy = -torch.special.xlogy(known_TV, known_TV).sum()
        wanted = -(known_TV * student_TV.log_softmax(dim=-1)).sum() - entropy
        torch.testing.assert_close(loss, wanted, atol=1e-3, rtol=1e-3)
        gradients = [torch.autograd.grad(each, student_TV)[0] for each in (loss, wanted)]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": "Forget.", "train": (), "retain": ("a",), "temperature": 0.0},
        {"top_p": 0.9},
        {"keep": "weakest"},
        {"logit_dtype": "float16"},
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="keep"):
        make(tmp_path / "cache", **changes)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"keep": "strongest"},
        {"keep": 1},
        {"top_p": 0.5},
        {"prefix": "a"},
        {"logit_dtype": "float16"},
    ],
)
def test_a_foreign_recipe_that_keeps_oddly_is_refused(
    folder: Path, entries: dict[str, Any]
) -> None:
    recipe = CacheReader.open(folder / "cache").manifest.recipe.to_json()
    assert Recipe.from_json(recipe).version == 3
    with pytest.raises((CorruptCacheError, ConfigurationError)):
        Recipe.from_json({**recipe, **entries})


@pytest.mark.parametrize(
    "by", [{"logsumexp": 0.1}, {"logits": -0.7}, {"logsumexp": 0.1, "logits": 0.1}]
)
def test_draws_that_do_not_add_up_are_named(
    folder: Path, tmp_path: Path, by: dict[str, float]
) -> None:
    path = next((folder / "cache/shards").iterdir())
    table = pq.read_table(path)
    for name, more in by.items():
        values = [[value + more for value in row] for row in table[name].to_pylist()]
        place, field = table.column_names.index(name), table.schema.field(name)
        table = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(table, tmp_path / "shard.parquet")

    [problem] = find_problems(
        [tmp_path / "shard.parquet"], CacheReader.open(folder / "cache").manifest.recipe
    )

    assert problem is not None
    assert "not 20 draws together" in problem
