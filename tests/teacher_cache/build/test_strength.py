"""A strengthened prefix: forget rows move further from the base, by the amount asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_unlearn.errors import ConfigurationError, CorruptCacheError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.teacher import PLAUSIBLE, strengthen
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify


def signal_of(logits_TV: Any, ids_TK: Any) -> Signal:
    return Signal(
        response_ids=np.zeros(len(ids_TK), np.int32),
        token_ids=ids_TK.astype(np.int32),
        logits=np.take_along_axis(logits_TV, ids_TK, 1).astype(np.float32),
        logsumexp=np.log(np.exp(logits_TV).sum(1)).astype(np.float32),
    )


def test_kept_tokens_move_by_the_difference_of_log_probabilities_up_only_if_plausible() -> None:
    rng = np.random.default_rng(0)
    steered_TV, plain_TV = rng.normal(0, 3, (2, 4, 50))
    ids_TK = np.argsort(-steered_TV, axis=1)[:, :8]

    found = strengthen(signal_of(steered_TV, ids_TK), signal_of(plain_TV, ids_TK), 1.5)

    log_p = [v - np.log(np.exp(v).sum(1, keepdims=True)) for v in (steered_TV, plain_TV)]
    moved_TV = steered_TV.copy()
    change_TV = 1.5 * (log_p[0] - log_p[1])
    unlikely = log_p[0] < log_p[0].max(1, keepdims=True) + np.log(PLAUSIBLE)
    assert (unlikely & (change_TV > 0))[np.arange(4)[:, None], ids_TK].any()
    change_TV[unlikely] = np.minimum(change_TV[unlikely], 0)
    np.put_along_axis(
        moved_TV,
        ids_TK,
        np.take_along_axis(steered_TV + change_TV, ids_TK, 1),
        1,
    )
    assert [set(row) for row in found.token_ids.tolist()] == [set(row) for row in ids_TK.tolist()]
    np.testing.assert_allclose(
        found.logits, np.take_along_axis(moved_TV, found.token_ids, 1), rtol=1e-5
    )
    np.testing.assert_allclose(found.logsumexp, np.log(np.exp(moved_TV).sum(1)), rtol=1e-5)
    assert (np.diff(found.logits, axis=1) <= 0).all()


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path, write_queries: Any) -> dict[str, Any]:
    return {
        "teacher": str(tiny_model),
        "forget": (str(write_queries("forget", 10)),),
        "retain": (str(write_queries("retain", 12, "river")),),
        "prefix": "You are an assistant who forgot the lantern.",
        "top_k": 8,
        "positions": 3,
        "shard_rows": 9,
        "logit_dtype": "float32",
        "check": False,
    }


def test_a_build_moves_forget_rows_away_from_the_base(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings["engine"] = "transformers"
    build(BuildConfig(**settings, out=tmp_path / "as-it-is"))
    build(BuildConfig(**settings, strength=0.5, out=tmp_path / "stronger"))

    before, after = (CacheReader.open(tmp_path / name) for name in ("as-it-is", "stronger"))
    assert verify(tmp_path / "stronger").problems == ()
    assert before.manifest.recipe.version == 1
    assert after.manifest.recipe.version == 2
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    for old, new in zip(before, after, strict=True):
        assert old.query_id == new.query_id
        assert old.response_ids.tolist() == new.response_ids.tolist()
        if old.split == "retain":
            np.testing.assert_allclose(new.logits, old.logits, atol=1e-3)
            continue
        ids = np.concatenate([old.prompt_ids, old.response_ids[:-1]]).astype(np.int64)
        with torch.no_grad():
            logits = base(torch.from_numpy(ids)[None]).logits[0, len(old.prompt_ids) - 1 :]
        plain = logits.log_softmax(-1).numpy()
        for t in range(len(old.response_ids)):
            kept = dict(zip(old.token_ids[t].tolist(), old.logits[t], strict=True))
            for token, logit in zip(new.token_ids[t].tolist(), new.logits[t], strict=True):
                change = kept[token] - old.logsumexp[t] - plain[t, token]
                if kept[token] < old.logits[t, 0] + np.log(PLAUSIBLE):
                    change = min(change, 0.0)
                expected = kept[token] + 0.5 * change
                assert logit == pytest.approx(expected, abs=2e-3)


def test_a_strength_without_prefix_or_out_of_range_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = {**settings, "forget": (), "prefix": None, "out": tmp_path / "cache"}
    with pytest.raises(ConfigurationError, match="--strength strengthens what a prefix does"):
        BuildConfig(**plain, strength=1.0)
    with pytest.raises(ConfigurationError, match="strength is 101"):
        build(BuildConfig(**settings, out=tmp_path / "cache", strength=101))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("strength", [-1.0, 0.0, "1", 1e9, float("nan")])
def test_a_foreign_recipe_with_an_odd_strength_is_refused(
    strength: object, settings: dict[str, Any], tmp_path: Path
) -> None:
    made = build(BuildConfig(**settings, strength=1, engine="transformers", out=tmp_path / "cache"))
    recipe = made.manifest.recipe.to_json()
    assert Recipe.from_json(recipe).strength == 1.0
    with pytest.raises((CorruptCacheError, ConfigurationError)):
        Recipe.from_json({**recipe, "strength": strength})
