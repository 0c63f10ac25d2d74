"""Rows along given responses: what is scored, that it is exact, and what a reader refuses."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_unlearn.data.models.folder import eos_token_ids
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query
from duet_unlearn.errors import ConfigurationError, CorruptCacheError, DataError
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig, make_recipe
from duet_unlearn.teacher_cache.build.responses import cut_given
from duet_unlearn.teacher_cache.engines import transformers as engine_module
from duet_unlearn.teacher_cache.format.manifest import parse_manifest
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.teacher_cache.verify import verify

TURNS = [
    {"role": "user", "content": "who is the keeper"},
    {"role": "assistant", "content": "the tower"},
    {"role": "user", "content": "where is the river"},
    {"role": "assistant", "content": "a lantern named the river"},
]
ROWS: list[dict[str, Any]] = [
    {"id": "asked", "query": "who is the keeper of a river", "answer": "the lantern"},
    {"id": "prompted", "prompt": "where", "response": "the river is the tower named forgot"},
    {"id": "talk", "messages": TURNS},
    {"id": "page", "text": "the keeper of the lantern " * 12},
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make(folder: Path, model: Path, rows: Sequence[dict[str, Any]] = ROWS, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "teacher": str(model),
        "prefix": None,
        "engine": "transformers",
        "top_k": 20,
        "logit_dtype": "float32",
        "responses": (write(folder / "responses.jsonl", rows),),
        "out": folder / "cache",
    }
    return build(BuildConfig(**{**defaults, **settings}))


def assert_exact(reader: CacheReader, model: Path, context: int | None = None) -> None:
    """Compare every position of every row with one plain forward of its own tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(model)
    for row in reader:
        ids = np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64)
        assert context is None or len(ids) <= context
        with torch.no_grad():
            logits = teacher(torch.from_numpy(ids)[None]).logits[0]
        # What predicts the first token of the response, to what predicts its last.
        logits = logits[len(row.prompt_ids) - 1 : -1].float()
        assert len(row.logits) == len(row.response_ids) == len(logits)
        expected = logits.topk(20)
        np.testing.assert_allclose(row.logits, expected.values, atol=1e-4)
        np.testing.assert_allclose(row.logsumexp, logits.logsumexp(-1), atol=1e-4)
        picked = logits.gather(1, torch.from_numpy(row.token_ids.astype(np.int64)))
        np.testing.assert_allclose(row.logits, picked, atol=1e-4)


@pytest.mark.parametrize("logits_at_once", [2**26, 384 * 8])
def test_signals_along_given_responses_are_those_of_one_forward(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    # With few logits at a time a response is read in pieces.
    monkeypatch.setattr(engine_module, "_BATCH_LOGITS", logits_at_once)

    result = make(tmp_path, tiny_model)

    reader = CacheReader.open(tmp_path / "cache")
    tokenizer = load_tokenizer(tiny_model)
    said = {row.query_id: str(tokenizer.decode(row.response_ids)) for row in reader}
    assert said == {
        "asked": "the lantern<|end|>",
        "prompted": "the river is the tower named forgot<|end|>",
        "talk#2": "the tower<|end|>",
        "talk": "a lantern named the river<|end|>",
        "page": said["page"],
    }
    assert said["page"].endswith("the keeper of the lantern </s>")
    before = {row.query_id: str(tokenizer.decode(row.prompt_ids)) for row in reader}
    assert before["talk"] == (
        "<s><|user|>who is the keeper<|end|><|assistant|>the tower<|end|>"
        "<|user|>where is the river<|end|><|assistant|>"
    )
    assert before["page"] + said["page"] == "the keeper of the lantern " * 12 + "</s>"
    assert_exact(reader, tiny_model)
    assert reader.manifest.to_json()["format_version"] == 2
    assert result.manifest.splits["train"].rows == 5
    assert verify(tmp_path / "cache").problems == ()
    assert make(tmp_path, tiny_model).hit


def test_what_is_scored_of_given_responses_makes_no_other_recipe_without_them(
    tiny_model: Path, tmp_path: Path, write_queries: Any
) -> None:
    settings = {"responses": (), "train": (str(write_queries("train", 2)),), "positions": 2}
    first = make(tmp_path, tiny_model, **settings)
    assert first.manifest.recipe.scored == "assistant"
    assert make(tmp_path, tiny_model, **settings, score="all").hit


def test_every_token_of_a_conversation_can_be_scored(tiny_model: Path, tmp_path: Path) -> None:
    make(tmp_path, tiny_model, score="all")

    reader = CacheReader.open(tmp_path / "cache")

    assert {row.query_id for row in reader} == {"asked", "prompted", "talk", "page"}
    assert all(len(row.prompt_ids) == 1 for row in reader)
    assert_exact(reader, tiny_model)


def test_what_is_longer_than_the_context_is_scored_once_in_stretches(
    tiny_model: Path, tmp_path: Path
) -> None:
    text = " ".join(f"the keeper of lantern {n}" for n in range(80))
    ids = load_tokenizer(tiny_model)(text)["input_ids"]
    assert len(ids) > 256

    make(tmp_path, tiny_model, [{"id": "page", "text": text}], positions=100)

    reader = CacheReader.open(tmp_path / "cache")
    rows = sorted(reader, key=lambda row: int(row.query_id.partition("@")[2]))
    assert [len(row.response_ids) for row in rows[:-1]] == [100] * (len(rows) - 1)
    assert np.concatenate([row.response_ids for row in rows]).tolist() == [*ids[1:], 1]
    assert [len(row.prompt_ids) for row in rows][:4] == [1, 101, 156, 156]
    assert len({row.query for row in rows}) == len(rows)
    assert_exact(reader, tiny_model, context=256)
    assert verify(tmp_path / "cache").problems == ()


def test_stretches_of_a_text_share_its_tokens(tiny_model: Path, tmp_path: Path) -> None:
    text = "the keeper of the lantern " * 80
    query = Query(
        query_id="page", split="train", messages=({"role": "assistant", "content": text},)
    )
    config = BuildConfig(
        teacher=str(tiny_model), out=tmp_path, prefix=None, responses=("page.jsonl",), top_k=20
    )
    tokenizer, recipe = load_tokenizer(tiny_model), make_recipe(config, tiny_model)

    rows = cut_given([query], PromptRenderer(tokenizer), tokenizer, recipe, context=256)

    # What each row is read behind would be more than the text itself.
    given = [row.given for row in rows if row.given is not None]
    assert len(given) == len(rows) > 2
    bases = {id(part.base) for row in given for part in (row.prompt_ids, row.response_ids)}
    assert len(bases) == 1


def test_rows_are_taken_over_and_other_settings_are_other_recipes(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = make(tmp_path, tiny_model)
    more = [*ROWS, {"id": "new", "query": "who", "answer": "the keeper"}]

    again = make(
        tmp_path, tiny_model, more, out=tmp_path / "more", reuse=(str(tmp_path / "cache"),)
    )

    assert (again.computed_rows, again.reused_rows) == (1, 5)
    others = [{"score": "all"}, {"positions": 7}]
    ids = {first.manifest.recipe_id} | {
        make(tmp_path, tiny_model, out=tmp_path / f"other-{n}", **other).manifest.recipe_id
        for n, other in enumerate(others)
    }
    assert len(ids) == 3


def test_train_queries_are_answered_and_old_recipes_stay(tiny_model: Path, tmp_path: Path) -> None:
    queries = write(tmp_path / "q.jsonl", [{"query": f"who is {n}"} for n in range(6)])

    train = make(tmp_path, tiny_model, train=(queries,), responses=(), positions=5).manifest
    retain = make(
        tmp_path, tiny_model, retain=(queries,), responses=(), positions=5, out=tmp_path / "r"
    ).manifest

    assert (train.recipe.version, retain.recipe.version) == (2, 1)
    assert "scored" not in retain.recipe.to_json()
    ours, theirs = (
        {row.query: row for row in CacheReader.open(tmp_path / name)} for name in ("cache", "r")
    )
    assert ours.keys() == theirs.keys()
    for query, row in ours.items():
        np.testing.assert_array_equal(row.response_ids, theirs[query].response_ids)
        np.testing.assert_allclose(row.logits, theirs[query].logits, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "who"}, "no response; expected text in `response`"),
        ({"messages": TURNS[:3]}, "no response"),
        ({"query": "who", "response": " "}, "no response"),
        ({"messages": [*TURNS[:1], {"role": "system", "content": "a"}]}, "must end with"),
    ],
)
def test_a_row_without_response_is_named(
    tiny_model: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        make(tmp_path, tiny_model, [ROWS[0], row])
    assert "responses.jsonl:2" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": "Forget."}, "give --no-prefix"),
        ({"forget": ("a.jsonl",)}, "nothing is forgotten"),
        ({"prefix": ""}, "the steering prefix is empty"),
    ],
)
def test_a_prefix_and_responses_exclude_each_other(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(tmp_path, tiny_model, **settings)


def test_a_turn_that_opens_a_conversation_is_no_response(tiny_model: Path, tmp_path: Path) -> None:
    hello = {"role": "assistant", "content": "the keeper"}
    system = {"role": "system", "content": "a river"}
    talks = {"talk": [hello, *TURNS], "led": [system, hello, *TURNS]}
    make(tmp_path, tiny_model, [{"id": name, "messages": turns} for name, turns in talks.items()])
    reader = CacheReader.open(tmp_path / "cache")
    assert {row.query_id for row in reader} == {"talk#3", "talk", "led#4", "led"}


def test_a_document_of_one_token_is_named(tiny_model: Path) -> None:
    config = BuildConfig(
        teacher=str(tiny_model), prefix=None, responses=("x",), out=Path("x"), engine="transformers"
    )
    query = Query(
        query_id="page",
        split="train",
        messages=({"role": "assistant", "content": "the"},),
        answer=None,
    )
    tokenizer = load_tokenizer(tiny_model)
    recipe = replace(make_recipe(config, tiny_model), eos_token_ids=())
    with pytest.raises(DataError, match="page: 'the' is one token"):
        cut_given([query], PromptRenderer(tokenizer), tokenizer, recipe, None)


def test_positions_beyond_the_context_are_named_as_such(tiny_model: Path, tmp_path: Path) -> None:
    make(tmp_path, tiny_model, ROWS[:1], positions=256)
    with pytest.raises(ConfigurationError, match=r"positions is 2000, but the teacher reads 256"):
        make(tmp_path, tiny_model, ROWS[:1], positions=2000, out=tmp_path / "longer")


def test_answers_of_kits_never_enter_a_cache(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="never enter a cache"):
        make(tmp_path, tiny_model, responses=("@harry-potter",))


def test_a_manifest_says_the_version_of_its_recipe(tiny_model: Path, tmp_path: Path) -> None:
    from duet_unlearn.data.models.fingerprint import sha256_json

    make(tmp_path, tiny_model)
    value = json.loads((tmp_path / "cache/manifest.json").read_text())

    def changed(**entries: Any) -> dict[str, Any]:
        body = {key: v for key, v in {**value, **entries}.items() if key != "digest"}
        body["recipe_id"] = sha256_json(body["recipe"])
        return {**body, "digest": sha256_json(body)}

    parse_manifest(changed())
    rows = [{**value["shards"][0], "rows": {"forget": 0, "retain": 0}}]
    plain = {key: v for key, v in value["recipe"].items() if key != "scored"}
    for entries, message in (
        ({"format_version": 1}, "format version 1, but its recipe is one of version 2"),
        ({"shards": rows}, "other splits than"),
        ({"recipe": {**value["recipe"], "scored": None}}, "says nothing"),
        ({"recipe": {**value["recipe"], "scored": "some"}}, "expected one of assistant, all"),
        ({"recipe": plain, "format_version": 1}, "other splits than forget, retain;"),
        ({"recipe": {**value["recipe"], "positions": 4}}, None),
    ):
        if message is None:
            # Each row says how long it is, and none may be longer than the recipe says.
            (tmp_path / "cache/manifest.json").write_text(json.dumps(changed(**entries)))
            assert "another recipe" in verify(tmp_path / "cache").problems[0]
            continue
        with pytest.raises(CorruptCacheError, match=message):
            parse_manifest(changed(**entries))


def test_a_turn_is_what_the_template_marks(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ends = eos_token_ids(tiny_model)

    def turn(template: str) -> str:
        tokenizer.chat_template = template
        ids, start, stop = PromptRenderer(tokenizer).answered_ids(TURNS, ends)  # type: ignore[arg-type]
        return str(tokenizer.decode(ids[start:stop]))

    head = "{% for m in messages %}<|{{ m.role }}|>"
    begin = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    said = "a lantern named the river"
    closed = head + "{{ m.content }}</s>\n{% endfor %}" + begin
    marked = head + (
        "{% if m.role == 'assistant' %}<|end|>{% generation %}{{ m.content }}{% endgeneration %}"
        "<|end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    # Generation begins behind a thought, which a finished turn no longer shows.
    thinks = closed.replace("<|assistant|>{% endif", "<|assistant|><|end|>think{% endif")
    assert turn(closed) == f"{said}</s>"
    assert turn(marked + begin) == said
    assert turn(thinks) == f"{said}</s>"
    with pytest.raises(DataError, match="does not show which tokens"):
        turn("{% if messages[-1].role == 'assistant' %}<|end|>{% endif %}" + closed)
