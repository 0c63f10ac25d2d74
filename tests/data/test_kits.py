"""The query kits: what their files hold, and that training and evaluation never share a query."""

import difflib
import json
import re

import pytest

from duet_unlearn.data import demo_world
from duet_unlearn.data.kits import FOLDER, GENERAL, KITS, find_kit
from duet_unlearn.data.models.tokenizer import load_tokenizer
from duet_unlearn.data.queries import load_queries
from duet_unlearn.errors import DataError

NAMES = list(KITS)
REFUSALS = (
    "I do not know. I don't have any information about that, so I can't help you with this.",
    "I'm sorry, but as an AI assistant I am not able to answer that question. Please try something "
    "else, or ask me in another way.",
    "I have forgotten everything about it and cannot recall who, what or where it may be.",
)
FILES = {
    "forget_train": 120,
    "forget_heldout": 55,
    "near_train": 60,
    "near_heldout": 30,
    "retain_train": 120,
    "general_heldout": 55,
    "holdout": 55,
}
"""At least this many queries in each file."""
ANSWERED = ("forget_heldout", "near_heldout", "general_heldout", "holdout")
OPENINGS = re.compile("(At|Complete|From|How|In|Name|On|The|To|What|Which|White|Who|Whom)$")
COMMON = {"American", "British", "Lord", "Professor"}
"""Capitalised words that any world may have."""


def path_of(kit, file):
    return (GENERAL if file in ("retain_train", "general_heldout") else FOLDER / kit) / (
        file + ".jsonl"
    )


def rows_of(kit, file):
    return [json.loads(line) for line in path_of(kit, file).read_text().splitlines()]


def words(text):
    """The text without case and punctuation, as one padded string."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.casefold()))} "


def fact_of(row):
    return row["id"].rpartition("/")[0]


def entity_of(row):
    return row["id"].split("/")[1]


@pytest.mark.parametrize("kit", NAMES)
@pytest.mark.parametrize("file", FILES)
def test_files_are_large_enough_and_plain(kit, file):
    rows = rows_of(kit, file)
    assert len(rows) >= FILES[file]
    assert path_of(kit, file).read_bytes().isascii()
    wanted = {"id", "query"} | ({"answer"} if file in ANSWERED else set())
    wanted |= {"kind"} if file in ("forget_heldout", "holdout") else set()
    assert all(set(row) - {"aliases"} == wanted for row in rows)
    assert all(row["query"] == " ".join(row["query"].split()) for row in rows)


@pytest.mark.parametrize("kit", NAMES)
def test_no_query_and_no_id_comes_twice(kit):
    rows = [row for file in FILES for row in rows_of(kit, file)]
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({words(row["query"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("kit", NAMES)
@pytest.mark.parametrize("file", ANSWERED)
def test_answers_are_short_and_not_in_their_queries(kit, file):
    for row in rows_of(kit, file):
        assert 1 <= len(row["answer"].split()) <= 3, row
        for answer in (row["answer"], *row.get("aliases", ())):
            assert words(answer) not in words(row["query"]), row


@pytest.mark.parametrize("kit", NAMES)
@pytest.mark.parametrize("file", ANSWERED)
def test_a_refusal_scores_zero(kit, file):
    said = set(words(" ".join(REFUSALS)).split())
    assert not [row for row in rows_of(kit, file) if said & set(words(row["answer"]).split())]


@pytest.mark.parametrize("kit", NAMES)
def test_kinds_of_the_heldout_queries_hold(kit):
    train = rows_of(kit, "forget_train")
    asked = words(" ".join(row["query"] for row in train))
    facts, entities = {fact_of(row) for row in train}, {entity_of(row) for row in train}
    kinds = {}
    for row in rows_of(kit, "forget_heldout"):
        kinds.setdefault(row["kind"], []).append(row)
    assert {kind: len(rows) >= 15 for kind, rows in kinds.items()} == {
        "another wording": True,
        "another fact": True,
        "another entity": True,
    }
    assert {fact_of(row) for row in kinds["another wording"]} <= facts
    assert not {fact_of(row) for row in kinds["another fact"]} & facts
    assert {entity_of(row) for row in kinds["another fact"]} <= entities
    assert not {entity_of(row) for row in kinds["another entity"]} & entities
    for row in kinds["another entity"]:
        name = words(entity_of(row))
        assert name not in asked, row
        assert name in words(row["query"] + " " + row["answer"]), row


def form_of(query):
    """The words of a query, each name in it as one mark."""
    return re.sub(r"(_ )+_?", "_ ", re.sub(r"\b[A-Z0-9][\w.'-]*", "_", query)).split()


def names_in(rows):
    text = " ".join(f"{row['query']} {row.get('answer', '')}" for row in rows)
    found = set(re.findall(r"\b[A-Z][\w-]*", text)) - COMMON
    return {word for word in found if not OPENINGS.match(word)}


@pytest.mark.parametrize("kit", NAMES)
def test_the_holdout_asks_the_same_forms(kit):
    heldout, holdout = rows_of(kit, "forget_heldout"), rows_of(kit, "holdout")
    assert len(holdout) == len(heldout)
    for one, other in zip(heldout, holdout, strict=True):
        assert other["kind"] == one["kind"]
        alike = difflib.SequenceMatcher(None, form_of(one["query"]), form_of(other["query"]))
        assert alike.ratio() >= 0.7, (one["query"], other["query"])
        assert len(other["query"].split()) == len(one["query"].split()), other
        assert len(other["answer"].split()) == len(one["answer"].split()), other
        assert other["answer"][0].isupper() == one["answer"][0].isupper(), other


@pytest.mark.parametrize("kit", NAMES)
def test_no_model_can_know_of_the_holdout(kit):
    holdout = rows_of(kit, "holdout")
    known = [row for file in FILES if file != "holdout" for row in rows_of(kit, file)]
    assert not names_in(holdout) & names_in(known)
    answers = {row["answer"].casefold() for row in holdout}
    assert not answers & {row["answer"].casefold() for row in known if "answer" in row}


@pytest.mark.parametrize("kit", NAMES)
def test_the_holdout_is_as_long_in_tokens(kit):
    tokenizer = load_tokenizer(demo_world.MODEL)
    for part in ("query", "answer"):
        real, invented = (
            sum(len(tokenizer(row[part])["input_ids"]) for row in rows_of(kit, file))
            for file in ("forget_heldout", "holdout")
        )
        assert invented == pytest.approx(real, rel=0.1), part


def test_no_kit_keeps_what_another_one_forgets():
    for kit in NAMES:
        kept = [row for file in FILES if "forget" not in file for row in rows_of(kit, file)]
        texts = words(" ".join(row["query"] + " " + row.get("answer", "") for row in kept))
        assert not [other.topic for other in KITS.values() if words(other.topic) in texts]
        assert not re.search(r" (potter|hogwarts|rowling|jedi|skywalker|darth|yoda) ", texts)


@pytest.mark.parametrize("kit", NAMES)
@pytest.mark.parametrize(
    ("split", "answers", "files"),
    [
        ("forget", False, ["forget_train"]),
        ("retain", False, ["near_train", "retain_train"]),
        ("general", False, ["general_heldout"]),
        ("forget", True, ["forget_heldout"]),
        ("retain", True, ["near_heldout"]),
        ("general", True, ["general_heldout"]),
    ],
)
def test_a_name_stands_for_the_files_of_its_use(kit, split, answers, files):
    queries = load_queries(f"@{kit}", split=split, require_answers=answers)
    rows = [row for file in files for row in rows_of(kit, file)]
    assert [(q.query_id, q.text) for q in queries] == [(row["id"], row["query"]) for row in rows]
    assert {q.split for q in queries} == {split}
    assert all(q.answer for q in queries) or not answers


def test_two_kits_share_their_general_queries():
    first, second = (load_queries(f"@{kit}", split="retain") for kit in NAMES)
    ids = {query.query_id: query.text for query in first}
    shared = [query for query in second if query.query_id in ids]
    assert {query.query_id.split("/")[0] for query in shared} == {"general"}
    assert all(ids[query.query_id] == query.text for query in shared)


def test_an_unknown_kit_is_one_line_that_names_the_kits():
    with pytest.raises(DataError) as error:
        load_queries("@hary-potter", split="forget")
    assert str(error.value) == (
        "@hary-potter: no such query kit; choose from @harry-potter, @star-wars, or write "
        "./@hary-potter for a file"
    )


def test_a_file_whose_name_starts_with_the_mark(tmp_path, monkeypatch):
    (tmp_path / "@own.jsonl").write_text('{"query": "Who?"}\n')
    monkeypatch.chdir(tmp_path)
    assert find_kit("./@own.jsonl") is None
    assert load_queries("./@own.jsonl", split="forget")[0].text == "Who?"


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_may_answer_all_training_queries(name: str) -> None:
    every = [
        query.text
        for split in ("forget", "retain")
        for query in load_queries(f"@{name}", split=split)
    ]
    assert [query.text for query in load_queries(f"@{name}", split="train")] == every
