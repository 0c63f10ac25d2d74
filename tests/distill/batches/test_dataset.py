import inspect
import math

import numpy as np
import pytest
import torch

from duet_unlearn.data.shapes import Shape
from duet_unlearn.distill.batches.dataset import CacheDataset, Example, collate
from duet_unlearn.distill.batches.sampler import PLAIN, Draw
from duet_unlearn.distill.config import LOSS_OPTIONS
from duet_unlearn.distill.losses import Loss, row_means
from duet_unlearn.distill.model import sparse_head
from duet_unlearn.distill.model.sparse_head import StudentScores
from duet_unlearn.errors import DataError
from duet_unlearn.teacher_cache.reader import CacheReader

TOP_K = 6


def example_of(name: str, prompt: list[int], response: list[int], *, seed: int = 0) -> Example:
    generator = np.random.default_rng([seed, len(prompt), len(response)])
    token_ids = np.stack([generator.permutation(384)[:TOP_K] for _ in response])
    return Example(
        name=name,
        split=0,
        weight=0.25,
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(response, np.int32),
        token_ids=token_ids.astype(np.int32),
        logits=generator.normal(size=(len(response), TOP_K)).astype(np.float32),
        logsumexp=np.full(len(response), 5, np.float32),
    )


@pytest.fixture
def ragged() -> list[Example]:
    return [
        example_of("short-long", [10, 11], [20, 21, 22, 23]),
        example_of("long-short", [30, 31, 32, 33, 34], [40]),
        example_of("middle", [50, 51, 52], [60, 61]),
    ]


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def scored_logits(model, batch) -> torch.Tensor:
    names = set(inspect.signature(model.forward).parameters)
    return sparse_head._scored(sparse_head._forward(model, batch, names, None), batch, None)


def test_layout_by_hand(ragged):
    batch = collate(ragged)
    assert batch["input_ids"].tolist() == [
        [0, 0, 0, 10, 11, 20, 21, 22],
        [30, 31, 32, 33, 34, 0, 0, 0],
        [0, 0, 50, 51, 52, 60, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
    ]
    assert batch["position_ids"][0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert batch["position_mask"].tolist() == [
        [True, True, True, True],
        [True, False, False, False],
        [True, True, False, False],
    ]
    assert batch["token_ids"].shape == (3, 4, TOP_K)
    assert batch["names"] == ["short-long", "long-short", "middle"]


def test_padded_batch_gives_every_position_what_its_row_alone_gives(ragged, model):
    batch = collate(ragged)
    with torch.no_grad():
        logits = scored_logits(model, batch)
        counts = batch["position_mask"].sum(dim=1).tolist()
        for example, together in zip(ragged, logits.split(counts), strict=True):
            sequence = [*example.prompt_ids.tolist(), *example.response_ids.tolist()]
            alone = model(torch.tensor([sequence])).logits[0]
            first = len(example.prompt_ids) - 1
            for position in range(len(example.response_ids)):
                torch.testing.assert_close(
                    together[position], alone[first + position], rtol=1e-4, atol=1e-4
                )


def losses_of(examples: list[Example], model, name: str) -> torch.Tensor:
    return losses_of_batch(collate(examples), model, name)


def losses_of_batch(batch: dict, model, name: str) -> torch.Tensor:
    loss = Loss(name=name)
    scores = StudentScores(model, tail=loss.tail)(model, batch)
    losses = loss(scores, batch["teacher_logits"], batch["teacher_logsumexp"])
    return row_means(losses, batch["position_mask"])


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_loss_and_gradients_equal_those_of_the_rows_alone(ragged, model, name):
    head = model.get_output_embeddings().weight
    together = losses_of(ragged, model, name)
    alone = torch.cat([losses_of([example], model, name) for example in ragged])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    (grad_together,) = torch.autograd.grad(together.sum(), head)
    (grad_alone,) = torch.autograd.grad(alone.sum(), head)
    assert torch.isfinite(grad_together).all()
    torch.testing.assert_close(grad_together, grad_alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_first_and_last_position_count_and_none_behind_it_does(ragged, model, name):
    with torch.no_grad():
        plain = losses_of_batch(collate(ragged), model, name)
        for row, example in enumerate(ragged):
            last = len(example.response_ids) - 1
            for position in range(4):
                batch = collate(ragged)
                if position <= last:
                    batch["teacher_logits"][row, position, 0] += 1
                else:
                    batch["teacher_logits"][row, position] = math.nan
                    batch["teacher_logsumexp"][row, position] = math.nan
                changed = losses_of_batch(batch, model, name) != plain
                expected = [i == row and position <= last for i in range(3)]
                assert changed.tolist() == expected, (row, position)


def test_the_student_of_the_first_and_last_position(ragged, model):
    """The first is read off the last prompt token, the last off the last but one of the answer."""
    batch = collate(ragged)
    with torch.no_grad():
        scores = StudentScores(model, tail=True)(model, batch)
        for row, example in enumerate(ragged):
            prompt, response = example.prompt_ids.tolist(), example.response_ids.tolist()
            for position, read in ((0, prompt), (len(response) - 1, prompt + response[:-1])):
                logits = model(torch.tensor([read])).logits[0, -1]
                ids = batch["token_ids"][row, position]
                rest = torch.ones(384, dtype=torch.bool).index_fill(0, ids, 0)
                expected = torch.cat([logits[ids], logits[rest].logsumexp(0, keepdim=True)])
                torch.testing.assert_close(scores[row, position], expected, rtol=1e-4, atol=1e-4)


def test_only_scored_positions_pass_the_head(ragged, model):
    widths = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: widths.append(output.shape[1])
    )
    with torch.no_grad():
        scored_logits(model, collate(ragged))
    handle.remove()
    assert widths == [4]


def test_dataset_gives_the_cached_row_and_trims_it(tiny_cache):
    reader = CacheReader.open(tiny_cache)
    row = reader.row(3)
    whole = CacheDataset(reader)[Draw(3, PLAIN, 0.5)]
    assert (whole.name, whole.weight) == (row.query_id, 0.5)
    np.testing.assert_array_equal(whole.prompt_ids, row.prompt_ids)
    np.testing.assert_array_equal(whole.logits, row.logits)
    trimmed = CacheDataset(reader, top_k=5)[Draw(3, PLAIN, 0.5)]
    np.testing.assert_array_equal(trimmed.token_ids, row.token_ids[:, :5])
    np.testing.assert_array_equal(trimmed.logits, row.logits[:, :5])


def test_fewer_positions_keep_the_first_ones(build_tiny_cache, tmp_path):
    reader = CacheReader.open(build_tiny_cache(tmp_path, forget=2, retain=1, positions=3))
    longest = next(i for i in range(3) if len(reader.row(i).response_ids) == 3)
    row = reader.row(longest)
    example = CacheDataset(reader, positions=2)[Draw(longest, PLAIN, 1.0)]
    np.testing.assert_array_equal(example.response_ids, row.response_ids[:2])
    np.testing.assert_array_equal(example.logits, row.logits[:2])
    assert collate([example])["input_ids"].shape[1] == len(row.prompt_ids) + 1


def test_a_view_changes_the_prompt_and_nothing_else(tiny_cache):
    reader = CacheReader.open(tiny_cache)
    rendered = []

    class Renderer:
        def student_ids(self, messages):
            rendered.append(messages)
            return [9, 8, 7]

    dataset = CacheDataset(
        reader, views=[Shape(name="shout", text="HEY {query} NOW")], renderer=Renderer()
    )
    plain, viewed = dataset[Draw(0, PLAIN, 0.5)], dataset[Draw(0, 0, 0.5)]
    assert rendered == [({"role": "user", "content": f"HEY {reader.row(0).query} NOW"},)]
    assert viewed.prompt_ids.tolist() == [9, 8, 7]
    assert viewed.name == f"{plain.name}/shout"
    np.testing.assert_array_equal(viewed.logits, plain.logits)
    np.testing.assert_array_equal(viewed.token_ids, plain.token_ids)


def test_a_sequence_longer_than_the_student_reads_is_named(tiny_cache):
    dataset = CacheDataset(CacheReader.open(tiny_cache), max_length=4)
    with pytest.raises(DataError, match=r"query (forget|retain)-\d+: \d+ tokens, .* at most 4"):
        dataset[Draw(0, PLAIN, 1.0)]
