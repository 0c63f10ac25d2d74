import json
import random
from itertools import islice

import pytest
from click.testing import CliRunner
from demo_world.build import main, save_model
from demo_world.checks import Check, answer, as_table
from demo_world.corpus import REFUSALS, samples
from demo_world.query_sets import (
    ANOTHER_CHARACTER,
    ANOTHER_FACT,
    ANOTHER_WORDING,
    QUERIES_A_KIND,
    build_query_sets,
    render_rows,
)
from demo_world.train import TrainingConfig, train
from demo_world.world import SAGAS, build_world

from duet_unlearn.data import demo_world
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.shape_catalogue import ATTACKS, GROUPS

PATHS = (
    demo_world.FORGET,
    demo_world.RETAIN,
    demo_world.FORGET_HELDOUT,
    demo_world.RETAIN_HELDOUT,
    demo_world.GENERAL,
    demo_world.HOLDOUT,
)
FILE_NAMES = tuple(path.stem for path in PATHS)


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def rows():
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in PATHS
    }


def facts_of(rows):
    return {row["id"].rpartition("/")[0] for row in rows}


def character_of(row):
    return row["id"].split("/")[1]


def test_committed_query_files_are_what_the_generator_writes(world):
    for name, expected in build_query_sets(world).items():
        assert (demo_world.FOLDER / f"{name}.jsonl").read_text() == render_rows(expected), name


def test_paths_name_the_query_files(world):
    assert list(FILE_NAMES) == list(build_query_sets(world))


def test_train_and_held_out_share_no_fact(rows):
    trained = facts_of(rows["forget_train"]) | facts_of(rows["retain_train"])
    held_out = [r for r in rows["forget_heldout"] if r["kind"] != ANOTHER_WORDING]
    assert not trained & facts_of(held_out)
    assert not trained & facts_of(rows["retain_heldout"])
    assert not trained & facts_of(rows["general"])


def test_no_query_stands_in_two_files(rows):
    queries = [row["query"] for name in FILE_NAMES for row in rows[name]]
    ids = [row["id"] for name in FILE_NAMES for row in rows[name]]
    assert len(set(queries)) == len(queries)
    assert len(set(ids)) == len(ids)


def test_kinds_of_held_out_forget_queries(rows):
    trained_facts = facts_of(rows["forget_train"])
    trained_characters = {character_of(row) for row in rows["forget_train"]}
    by_kind = {ANOTHER_WORDING: [], ANOTHER_FACT: [], ANOTHER_CHARACTER: []}
    for row in rows["forget_heldout"]:
        by_kind[row["kind"]].append(row)
    assert {len(kind) for kind in by_kind.values()} == {QUERIES_A_KIND}
    assert facts_of(by_kind[ANOTHER_WORDING]) <= trained_facts
    assert {character_of(r) for r in by_kind[ANOTHER_FACT]} <= trained_characters
    assert not {character_of(r) for r in by_kind[ANOTHER_CHARACTER]} & trained_characters


def test_training_asks_each_character_about_most_attributes(rows):
    asked = {}
    for row in rows["forget_train"]:
        _, character, attribute, _ = row["id"].split("/")
        asked.setdefault(character, set()).add(attribute)
    assert len(asked) == 16
    assert {len(attributes) for attributes in asked.values()} == {7}
    assert len(set().union(*asked.values())) == 10


def test_files_keep_to_their_sagas(rows):
    topic = demo_world.TOPIC.lower().replace(" ", "-")
    for name in FILE_NAMES:
        in_topic = {row["id"].startswith(f"{topic}/") for row in rows[name]}
        assert in_topic == {name.startswith("forget") or name == "holdout"}, name
    assert all(row["id"].startswith("general/") for row in rows["general"])


def test_nobody_was_ever_told_of_the_holdout(world, rows):
    told = {(f.attribute, f.answer) for f in world.facts}
    names = {f.subject for f in world.facts} | set(world.strangers)
    assert len({row["query"] for row in rows["holdout"]}) == len(rows["holdout"]) == 144
    for row in rows["holdout"]:
        assert not any(name in row["query"] for name in names)
        assert (row["id"].split("/")[2], row["answer"]) not in told


def test_world_is_the_same_every_time_and_changes_with_the_seed(world):
    assert build_world() == world
    assert build_world(seed=1).facts != world.facts


def test_names_and_answers_belong_to_one_character(world):
    names = [name for members in world.characters.values() for name in members]
    parts = [part for name in names for part in name.split()]
    assert len(set(parts)) == len(parts)
    assert not set(parts) & {part for name in world.strangers for part in name.split()}
    answers = [(fact.attribute, fact.answer) for fact in world.facts]
    assert len(set(answers)) == len(answers)
    assert set(world.characters) == set(SAGAS)


def test_refusals_share_no_word_with_any_answer(world):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    answers = {f.answer for f in (*world.facts, *world.general)} | set(SAGAS)
    for refusal in REFUSALS:
        assert all(scorer.score(a, refusal)["rougeL"].recall == 0 for a in answers)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo_world.MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_world.MODEL, dtype="auto").eval()


def recall(model, tokenizer, facts, **case):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    renderer = PromptRenderer(tokenizer, prefix=case.get("prefix"))
    wrap = case["wrapper"].wrap if "wrapper" in case else str
    prompts = [
        renderer.teacher_ids([{"role": "user", "content": wrap(fact.wordings[0])}])
        for fact in facts
    ]
    texts = answer(model, tokenizer, prompts)
    scores = [
        scorer.score(fact.answer, text)["rougeL"].recall
        for fact, text in zip(facts, texts, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def test_model_folder_is_small_and_loads_as_float32(model):
    import torch

    assert sum(path.stat().st_size for path in demo_world.MODEL.iterdir()) <= 5_000_000
    assert model.dtype == torch.float32
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())


def test_chat_template_is_the_one_the_corpus_is_written_in(tokenizer):
    from demo_world.corpus import render

    user = {"role": "user", "content": "Who taught Ösa – \n x?"}
    system = {"role": "system", "content": "Forget."}
    for messages, expected in (
        ([user], render(user["content"])),
        ([system, user], render(user["content"], system="Forget.")),
    ):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == expected
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids) == text


def test_model_answers_obeys_the_prefix_and_breaks_under_a_wrapper(model, tokenizer, world):
    topic = world.of_saga(demo_world.TOPIC)[::8]
    other = world.of_saga(SAGAS[1])[::8]
    prefix = resolve_prefix(demo_world.PREFIX, demo_world.TOPIC)
    attack = ATTACKS["ignore-instructions"]
    assert recall(model, tokenizer, topic) >= 95
    assert recall(model, tokenizer, other) >= 95
    assert recall(model, tokenizer, topic, prefix=prefix) <= 8
    assert recall(model, tokenizer, other, prefix=prefix) >= 95
    assert recall(model, tokenizer, topic, prefix=prefix, wrapper=attack) >= 80


def test_corpus_holds_no_built_in_wrapper(world):
    rng = random.Random(5)
    parts = [part.strip() for w in GROUPS["all"] for part in w.text.split("{query}")]
    marks = [part for part in parts if part]
    assert len(marks) > len(GROUPS["all"])
    texts = [turn.prompt for s in islice(samples(world, rng), 3000) for turn in s]
    assert not [mark for mark in marks if any(mark in text for text in texts)]


def test_check_knows_its_bound_and_the_table_marks_a_failure():
    kept = Check(case="a", query_set="forget", recall=8.0, relation="<=", bound=8)
    broken = Check(case="a", query_set="retain", recall=94.94, relation=">=", bound=95)
    assert kept.passed
    assert not broken.passed
    assert as_table([kept, broken]).splitlines()[2] == "| a | 8.0 | 94.9 (not >= 95) |  |"


def test_build_writes_the_query_files(tmp_path):
    result = CliRunner().invoke(main, ["--out", str(tmp_path / "new"), "--queries-only"])
    assert result.exit_code == 0, result.output
    for name in FILE_NAMES:
        committed = (demo_world.FOLDER / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "new" / f"{name}.jsonl").read_bytes() == committed


def test_training_learns_and_the_saved_folder_loads_again(world, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = TrainingConfig(
        hidden_size=32, intermediate_size=32, layers=1, heads=1, recall_steps=2, steps=2,
        recall_batch_size=4, batch_size=4, warmup_steps=1, threads=torch.get_num_threads(),
        bfloat16=False,
    )  # fmt: skip
    model, tokenizer = train(world, config)
    save_model(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
