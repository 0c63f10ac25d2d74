"""Positions where the teacher is least sure: against plain Python, and the losses taken there."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duet_unlearn.distill.batches.sampler import FORGET, PLAIN, TRAIN, Draw
from duet_unlearn.distill.batches.selection import entropy, least_sure
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.losses import Loss, scores_of
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives.base import open_objective
from duet_unlearn.distill.run import run
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig


def test_entropy_by_hand():
    # Half, a quarter and the rest as one symbol; shifted by 3, which changes nothing.
    logits = torch.tensor([0.5, 0.25], dtype=torch.float64).log() + 3
    expected = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    found = entropy(logits, torch.tensor(3.0, dtype=torch.float64))
    assert found.item() == pytest.approx(expected)
    # A place without a token, as in caches made with top-p.
    logits = torch.cat([logits, torch.tensor([-math.inf], dtype=torch.float64)])
    assert entropy(logits, torch.tensor(3.0, dtype=torch.float64)).item() == found.item()


def test_entropy_is_that_of_all_tokens_merged_beyond_the_k():
    torch.manual_seed(0)
    whole = 3 * torch.randn(5, 40, dtype=torch.float64)
    cached = whole.topk(6).values
    shares = whole.softmax(dim=-1).sort(descending=True).values
    merged = torch.cat([shares[:, :6], shares[:, 6:].sum(dim=-1, keepdim=True)], dim=-1)
    found = entropy(cached, whole.logsumexp(dim=-1))
    torch.testing.assert_close(found, -(merged * merged.log()).sum(dim=-1))
    assert bool((found <= -(shares * shares.log()).sum(dim=-1)).all())


def batch_of(shares: list[list[float]], splits: list[int]) -> dict[str, torch.Tensor]:
    """One cached token a position, whose probability decides the entropy; right padded."""
    width = max(map(len, shares))
    rows = [row + [0.5] * (width - len(row)) for row in shares]
    return {
        "teacher_logits": torch.tensor(rows).log()[..., None],
        "teacher_logsumexp": torch.zeros(len(rows), width),
        "position_mask": torch.tensor([[i < len(r) for i in range(width)] for r in shares]),
        "split": torch.tensor(splits),
    }


def test_a_share_of_each_training_row_is_kept():
    # The nearer to a half, the higher the entropy; what pads has the highest.
    shares = [[0.9, 0.6, 0.99, 0.7, 0.8], [0.99, 0.6], [0.9]]
    kept = least_sure(batch_of(shares, [TRAIN, TRAIN, TRAIN]), 0.4).tolist()
    assert kept == [
        [False, True, False, True, False],
        [False, True] + 3 * [False],
        [True, *4 * [False]],
    ]
    # Rounded up, but 0.2 of 5 is 1; of equals the earlier.
    assert least_sure(batch_of(shares, 3 * [TRAIN]), 0.2)[0].sum() == 1
    assert least_sure(batch_of([[0.7, 0.7, 0.7]], [TRAIN]), 0.5).tolist() == [[True, True, False]]
    assert least_sure(batch_of(shares, 3 * [TRAIN]), 1e-12).sum(dim=-1).tolist() == [1, 1, 1]


def test_rows_of_other_splits_keep_their_positions():
    batch = batch_of([[0.9, 0.6, 0.8], [0.9, 0.6]], [FORGET, TRAIN])
    assert least_sure(batch, 0.1).tolist() == [[True, True, True], [False, True, False]]


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    source = folder / "texts.jsonl"
    texts = ("the keeper of a lantern ", "who is named river ", "where is the tower ")
    source.write_text("".join(f'{{"text": "{text * n}"}}\n' for n, text in enumerate(texts, 1)))
    config = BuildConfig(
        teacher=str(tiny_model),
        prefix=None,
        responses=(str(source),),
        out=folder / "cache",
        engine="transformers",
        top_k=20,
        logit_dtype="float32",
    )
    build(config)
    return config.out


@pytest.mark.parametrize("ce_weight", [0.0, 0.25])
@pytest.mark.parametrize("loss", ["kl-tail", "huber"])
def test_the_loss_is_the_mean_where_the_teacher_is_least_sure(
    cache: Path, tiny_model: Path, make_model: Callable[..., Path], tmp_path: Path, loss, ce_weight
):
    from transformers import AutoModelForCausalLM

    other = make_model(tmp_path / "other", seed=3)
    config = RunConfig(
        cache=str(cache),
        student=str(other),
        out="none",
        loss=loss,
        ce_weight=ce_weight,
        select_entropy=0.3,
    )
    objective = open_objective(config, open_student(str(other)))
    teacher, model = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model, other))
    objective.attach(model)
    examples = [objective.dataset[Draw(row, PLAIN, 1.0)] for row in range(3)]

    found = objective.row_losses(model, objective.collate(examples)).tolist()

    for example, row_loss in zip(examples, found, strict=True):
        ids = torch.tensor([*example.prompt_ids.tolist(), *example.response_ids.tolist()])
        start = len(example.prompt_ids) - 1
        with torch.no_grad():
            said, wanted = (m(ids[None]).logits[0, start:-1] for m in (model, teacher))
        top = wanted.softmax(dim=-1).topk(20).values
        each = torch.cat([top, 1 - top.sum(dim=-1, keepdim=True)], dim=-1)
        entropies = -(each * each.clamp(min=1e-12).log()).sum(dim=-1)
        kept = entropies.topk(math.ceil(0.3 * len(entropies))).indices
        compare = Loss(name=loss)
        scores = scores_of(said, torch.tensor(example.token_ids).long(), tail=compare.tail)
        given = torch.tensor(example.logits), torch.tensor(example.logsumexp)
        naive = (1 - ce_weight) * compare(scores, *given)[kept].mean()
        response = torch.tensor(example.response_ids).long()
        naive = naive + ce_weight * torch.nn.functional.cross_entropy(said, response)
        assert row_loss == pytest.approx(naive.item(), rel=1e-3)


def test_a_run_says_where_it_took_the_loss(cache: Path, tiny_model: Path, tmp_path: Path):
    settings = {"cache": str(cache), "student": str(tiny_model), "loss": "kl-tail", "epochs": 1}
    run(RunConfig(**settings, out=str(tmp_path / "student"), select_entropy=0.2))
    card = (tmp_path / "student/README.md").read_text()
    assert "kl-tail, where the teacher's entropy is highest (20%)" in card


def test_what_has_no_positions_to_select_is_refused(train):
    with pytest.raises(ConfigurationError, match=r"select_entropy is 0\.5, but .* no rows of the"):
        train(select_entropy=0.5)
    with pytest.raises(ConfigurationError, match="select_entropy is 0, expected a number, above 0"):
        RunConfig(cache="c", student="s", out="o", select_entropy=0)
