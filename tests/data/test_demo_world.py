import json

import pytest

from duet_unlearn.data import demo_world
from duet_unlearn.data.demo_world.corpus import REFUSALS
from duet_unlearn.data.demo_world.query_sets import (
    ANOTHER_CHARACTER,
    ANOTHER_FACT,
    ANOTHER_WORDING,
    FILE_NAMES,
    QUERIES_A_KIND,
    build_query_sets,
    render_rows,
)
from duet_unlearn.data.demo_world.world import SAGAS, build_world


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def rows():
    return {
        name: [
            json.loads(line)
            for line in (demo_world.FOLDER / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in FILE_NAMES
    }


def facts_of(rows):
    return {row["id"].rpartition("/")[0] for row in rows}


def character_of(row):
    return row["id"].split("/")[1]


def test_committed_query_files_are_what_the_generator_writes(world):
    for name, expected in build_query_sets(world).items():
        assert (demo_world.FOLDER / f"{name}.jsonl").read_text() == render_rows(expected), name


def test_paths_name_the_query_files():
    paths = (
        demo_world.FORGET,
        demo_world.RETAIN,
        demo_world.FORGET_HELDOUT,
        demo_world.RETAIN_HELDOUT,
        demo_world.GENERAL,
    )
    assert [path.stem for path in paths] == list(FILE_NAMES)


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
        assert in_topic == {name.startswith("forget")}, name
    assert all(row["id"].startswith("general/") for row in rows["general"])


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
