"""Query files as users have them: written by hand, exported, cut off, in the wrong encoding."""

import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_unlearn.data.messages import Message, messages_from_text, text_from_messages
from duet_unlearn.data.queries import Query, fingerprint_queries, load_queries
from duet_unlearn.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def error_of(source: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_queries(source, split="forget", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_row_becomes_a_query(tmp_path):
    source = write(
        tmp_path,
        "forget.jsonl",
        lines({"id": 7, "query": "Who?", "answer": "Orn", "kind": "wording", "other": [1]}),
    )
    assert load_queries(source, split="forget") == [
        Query(
            query_id="7",
            split="forget",
            messages=({"role": "user", "content": "Who?"},),
            answer="Orn",
            kind="wording",
        )
    ]


def test_an_id_follows_from_split_and_text(tmp_path):
    source = write(tmp_path, "a.jsonl", '{"query": "Who?"}\n')
    forget, retain = (load_queries(source, split=split)[0] for split in ("forget", "retain"))
    # printf 'forget\0Who?' | sha256sum
    assert forget.query_id == "q-f349601604254f35"
    assert retain.query_id == "q-281c25a9c91d253b"
    assert Query.from_text("Who?", split="forget") == forget


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_queries(tmp_path, name):
    rows = [
        {"id": "1", "question": 'Zoë said "no",\nwhy? \u2028 👩‍👩‍👧', "answer": "Because"},
        {"id": "2", "question": "  e\u0301 is not \u00e9 ", "answer": None},
    ]
    path = tmp_path / name
    if name == "a.csv":
        # Written by hand, as Excel does: BOM, quotes doubled, a line feed within quotes.
        write(
            tmp_path,
            name,
            '\ufeffid,question,answer\r\n1,"Zoë said ""no"",\nwhy? \u2028 👩‍👩‍👧",Because\r\n'
            "2,  e\u0301 is not \u00e9 ,\r\n",
        )
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "array.json":
        write(tmp_path, name, json.dumps(rows, indent=2))
    else:
        write(
            tmp_path, name, "\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        )
    queries = load_queries(str(path), split="retain")
    assert [(q.query_id, q.text, q.answer) for q in queries] == [
        (row["id"], row["question"], row["answer"]) for row in rows
    ]


def test_the_first_column_with_a_value_is_the_query(tmp_path):
    turns = [{"role": "user", "content": "third"}]
    source = write(
        tmp_path,
        "a.jsonl",
        lines(
            {"messages": turns, "question": "second", "query": "first"},
            {"messages": turns, "question": "second", "query": ""},
            {"messages": turns, "question": None},
        ),
    )
    texts = [query.text for query in load_queries(source, split="forget")]
    assert texts == ["first", "second", "third"]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Orn."},
    {"role": "user", "content": "Who is that?"},
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_conversations(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(tmp_path, path.name, lines({"messages": TURNS}))
    elif suffix == "csv":
        write(tmp_path, path.name, 'messages\n"' + json.dumps(TURNS).replace('"', '""') + '"\n')
    else:
        # Arrow gives every turn the fields of all of them.
        with_name = [{**TURNS[0], "name": None}, *TURNS[1:]]
        pq.write_table(pa.Table.from_pylist([{"messages": with_name}]), path)
    (query,) = load_queries(str(path), split="forget")
    assert list(query.messages) == TURNS
    assert json.loads(query.text) == TURNS
    assert messages_from_text(query.text) == query.messages


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("Who?", "`messages` is text but not JSON (Expecting value: line 1 column 1 (char 0))"),
        ({"role": "user"}, "`messages` must be a list of turns, found an object"),
        ("[]", "`messages` must be a list of turns, found an empty list"),
        (["Who?"], "turn 1 of `messages` must be an object with role and content"),
        (
            [{"role": "human", "content": "Who?"}],
            "turn 1 of `messages` has role 'human': expected system, user or assistant",
        ),
        ([{"role": "user"}], "content of turn 1 must be text, found nothing"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}],
            "content of turn 1 must be text, found a list",
        ),
        (
            [{"role": "user", "content": "Who?", "name": "Ann"}],
            "turn 1 of `messages` has 'name' beside role and content",
        ),
        (TURNS[:3], "`messages` must end with a user turn, found 'assistant' last"),
        (
            [{"role": "user", "content": " "}],
            "the last turn of `messages` is blank; remove the row or fill it in",
        ),
        ([TURNS[1], TURNS[0], TURNS[1]], "a system turn of `messages` must stand first"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, value, problem):
    source = write(tmp_path, "a.jsonl", lines({"query": "Who?"}, {"messages": value}))
    assert error_of(source) == f"{source}:2: {problem}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '{"query": "Who?"',
            "not JSON (Expecting ',' delimiter at character 17); expected one object a line",
        ),
        ('"Who?"', 'expected an object such as {"query": "..."}, found \'Who?\''),
        ('{"query": " \\n"}', "`query` is blank; remove the row or fill in the query"),
        ('{"query": 12}', "`query` must be text, found a number"),
        (
            '{"prompt": "Who?", "id": 1}',
            "no query; expected a value in `query`, `question` or `messages` (columns: prompt, id)",
        ),
        (
            '{"query": "a\\ud83d"}',
            "`query` has half a surrogate pair (U+D83D) at character 2: no tokenizer takes it, "
            "repair the text",
        ),
        ('{"query": "Who?", "answer": ["a"]}', "`answer` must be text or a number, found a list"),
        ('{"query": "Who?", "id": true}', "`id` must be text or a number, found true or false"),
        (
            b'{"query": "Zo\xeb?"}',
            "not UTF-8 (byte 0xeb at position 14 of the line); save the file as UTF-8",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    good = '{"query": "\u2028 is no line end"}\r\n\r\n'.encode()
    source = write(tmp_path, "a.jsonl", good + (line if isinstance(line, bytes) else line.encode()))
    assert error_of(source) == f"{source}:3: {problem}"


def test_every_fault_names_its_file_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in ("nonsense", '{"query": ""}'):
        write(tmp_path, "a.jsonl", '{"query": "Who?"}\n' + line)
        assert error_of("./a.jsonl").startswith("a.jsonl:2: ")


def test_json_that_python_cannot_hold_is_named(tmp_path):
    deep = write(tmp_path, "deep.jsonl", "[" * 200_000)
    assert error_of(deep).startswith(f"{deep}:1: not usable JSON (")
    long = write(tmp_path, "long.jsonl", '{"id": ' + "1" * 5000 + "}")
    assert error_of(long).startswith(f"{long}:1: not usable JSON (")


def test_a_broken_array_is_named(tmp_path):
    source = write(tmp_path, "a.json", '[\n  {"query": "Who?"},\n  {"query": }\n]')
    assert error_of(source) == f"{source}:3: not JSON (Expecting value at character 13)"
    source = write(tmp_path, "b.json", '[{"query": "Who?"}, {"query": ""}]')
    assert error_of(source).startswith(f"{source} item 2: no query; ")


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (
            "id;query\n1;Who?\n",
            "",
            "no column named query, question or messages; found 'id;query'; "
            "separate the fields with commas",
        ),
        (
            "id,prompt\n1,Who?\n",
            "",
            "no column named query, question or messages; found 'id', 'prompt'",
        ),
        ("query,query\na,b\n", ":1", "two columns have the same name"),
        (
            'id,query\n1,"two\nlines"\n2,Who, and why?\n',
            ":4",
            "3 fields, expected 2 as in the header; quote a field that holds a comma",
        ),
        ('id,query\n1,"Who?\n2,Why?\n', ":2", "not CSV (unexpected end of data)"),
        (
            'id,query\n\n1,"two\nlines"\n2,\n',
            ":5",
            "no query; expected a value in `query`, `question` or `messages` (columns: id, query)",
        ),
        (
            b"query\nWho?\nZo\xeb\n",
            ":3",
            "not UTF-8 (byte 0xeb at position 3 of the line); save the file as UTF-8",
        ),
    ],
)
def test_a_bad_csv_file_is_named(tmp_path, content, place, problem):
    source = write(tmp_path, "a.csv", content)
    assert error_of(source) == f"{source}{place}: {problem}"


def test_a_bad_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["Who?", None], "id": [1.0, 2.0]}), path)
    assert error_of(str(path)).startswith(f"{path} row 2: no query; ")
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"PAR1" + whole[4:-60] + b"\0" * 60, b"x"):
        path.write_bytes(broken)
        assert error_of(str(path)).startswith(f"{path}: broken or cut-off Parquet (")
    pq.write_table(pa.table({"prompt": ["Who?"]}), path)
    assert error_of(str(path)) == (
        f"{path}: no column named query, question or messages; found 'prompt'"
    )
    pq.write_table(pa.table({"query": pa.array([], pa.string())}), path)
    assert error_of(str(path)) == f"{path}: no queries in it; expected at least one row"


def test_numbers_in_optional_columns_read_as_they_were_written(tmp_path):
    source = write(
        tmp_path,
        "a.jsonl",
        '{"query": "a", "answer": 1979}\n{"query": "b", "answer": 1979.0}\n'
        '{"query": "c", "answer": 0.5}\n{"query": "d", "answer": NaN, "id": NaN, "kind": " "}\n',
    )
    queries = load_queries(source, split="general")
    assert [query.answer for query in queries] == ["1979", "1979", "0.5", None]
    assert (queries[3].query_id[:2], queries[3].kind) == ("q-", None)


def test_a_missing_answer_is_named_where_answers_are_needed(tmp_path):
    source = write(tmp_path, "a.csv", "query,answer\nWho?,Orn\nWhy?,\n")
    assert len(load_queries(source, split="forget")) == 2
    assert error_of(source, require_answers=True) == (
        f"{source}:3: no answer; evaluation needs a value in the column `answer`"
    )


def test_duplicates_collapse_to_the_first(tmp_path, caplog):
    rows = [{"query": "a"}, {"query": "b", "id": "x"}, {"query": "a"}, {"query": "b", "id": "x"}]
    source = write(tmp_path, "a.jsonl", lines(*rows, {"query": "b", "id": "y"}))
    with caplog.at_level(logging.INFO):
        queries = load_queries(source, split="forget")
    assert [query.text for query in queries] == ["a", "b", "b"]
    assert caplog.messages == [f"{source}: 2 duplicate rows left out, 3 kept"]


def test_one_id_for_two_queries_is_an_error(tmp_path):
    source = write(tmp_path, "a.jsonl", lines({"query": "a", "id": 1}, {"query": "b", "id": "1"}))
    assert error_of(source) == (
        f"{source}:2: id '1' already belongs to another query at {source}:1; "
        "give each query its own id"
    )


def test_what_is_no_query_file(tmp_path):
    empty = write(tmp_path, "forget.jsonl", "")
    assert error_of(empty) == f"{empty}: the file is empty; expected one query a row"
    blank = write(tmp_path, "blank.jsonl", "\n \n")
    assert error_of(blank) == f"{blank}: no queries in it; expected at least one row"
    assert error_of(str(tmp_path)) == (
        f"{tmp_path}: this is a folder; name a file in it: blank.jsonl, forget.jsonl"
    )
    near = str(tmp_path / "forgot.jsonl")
    assert error_of(near) == f"{near}: no such file; did you mean forget.jsonl?"
    far = str(tmp_path / "x" / "forget.jsonl")
    assert (
        error_of(far) == f"{far}: no such file; the folder {tmp_path / 'x'} does not exist either"
    )
    packed = write(tmp_path, "a.jsonl.gz", b"\x1f\x8b")
    assert error_of(packed) == (
        f"{packed}: file type .gz is unknown: expected .jsonl, .json, .csv, .parquet, or hub:NAME; "
        "unpack it first"
    )
    (tmp_path / "void").mkdir()
    assert error_of(str(tmp_path / "void")).endswith("this is a folder; expected a file")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    source = write(tmp_path, "secret.jsonl", '{"query": "Who?"}\n')
    Path(source).chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            # Root reads anything: become nobody for the moment of the test.
            for folder in (tmp_path, *tmp_path.parents[:3]):
                folder.chmod(folder.stat().st_mode | 0o011)
            os.seteuid(65534)
        message = error_of(source)
    finally:
        if is_root:
            os.seteuid(0)
    assert message == f"{source}: cannot be read (Permission denied)"


def test_the_text_of_a_conversation_turns_back():
    plain = (Message(role="user", content="Who?"),)
    assert text_from_messages(plain) == "Who?"
    # A query that looks like a conversation is written as one, so that it stays what it is.
    looks = (Message(role="user", content='[{"role": "user", "content": "Who?"}]'),)
    assert messages_from_text(text_from_messages(looks)) == looks
    assert text_from_messages(looks) != looks[0]["content"]
    assert messages_from_text("[1, 2] are numbers?") == (
        Message(role="user", content="[1, 2] are numbers?"),
    )


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    st.sampled_from(['[{"role": "user", "content": "a"}]', "[", "[]", '["a"]']),
)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), max_size=3), TEXTS)
def test_any_conversation_turns_back(turns, last):
    messages = tuple(Message(role=role, content=text) for role, text in [*turns, ("user", last)])
    assert messages_from_text(text_from_messages(messages)) == messages


def test_the_fingerprint_is_over_all_rows_in_any_order():
    one, two = Query.from_text("a", split="forget"), Query.from_text("b", split="retain")
    both = fingerprint_queries([one, two])
    assert both == fingerprint_queries([two, one])
    assert both.startswith("sha256:")
    assert len(both) == 71
    others = [
        [one],
        [one, two, two],
        [one, Query.from_text("b", split="forget")],
        [one, Query.from_text("b ", split="retain", query_id=two.query_id)],
        [one, Query.from_text("b", split="retain", query_id="x")],
    ]
    assert len({both, *(fingerprint_queries(queries) for queries in others)}) == 6


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        load_queries(write(tmp_path, "a.jsonl", '{"query": "Who?"}'), split="forgot")
    assert (
        str(caught.value)
        == "split 'forgot' is unknown: expected one of forget, retain, general, train"
    )
    with pytest.raises(DataError):
        Query.from_text("Who?", split="test")


def test_many_rows_are_read_in_order(tmp_path):
    rows = lines(*({"query": f"Question {i}?", "id": i} for i in range(100_000)))
    queries = load_queries(write(tmp_path, "a.jsonl", rows), split="forget")
    assert len(queries) == 100_000
    assert queries[99_999].text == "Question 99999?"


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A dataset folder: what `datasets` reads from the hub, without a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "quiz"
    for config in ("saga", "world"):
        (folder / config).mkdir(parents=True)
        write(folder / config, "train.jsonl", lines({"question": f"{config}?", "answer": "a"}))
    write(folder / "saga", "test.jsonl", lines({"question": "t1?"}, {"question": " "}))
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: saga\n  data_files:\n"
        "  - {split: train, path: saga/train.jsonl}\n  - {split: test, path: saga/test.jsonl}\n"
        "- config_name: world\n  data_files: world/train.jsonl\n---\n"
    )
    return folder


def test_hub_datasets(hub_folder):
    hub = f"hub:{hub_folder}"
    assert load_queries(f"{hub}:saga:train", split="forget")[0].text == "saga?"
    assert load_queries(f"{hub}:world", split="forget")[0].text == "world?"
    assert load_queries(f"{hub}:saga:test[:1]", split="forget")[0].text == "t1?"
    assert error_of(f"{hub}:saga:test") == (
        f"{hub}:saga:test row 2: `question` is blank; remove the row or fill in the query"
    )
    assert error_of(hub) == f"{hub}: name one configuration of saga, world"
    assert error_of(f"{hub}:saga") == f"{hub}:saga: name one split of train, test"
    assert error_of(f"{hub}:moon:train") == (
        f"{hub}:moon:train: no configuration 'moon'; there are saga, world"
    )
    assert error_of(f"{hub}:world:test") == f"{hub}:world:test: no split 'test' among train"
    assert error_of("hub:a:b:c:d") == "hub:a:b:c:d: expected hub:NAME[:CONFIG][:SPLIT]"


def test_one_part_behind_a_dataset_name_may_be_a_split(hub_folder):
    hub = f"hub:{hub_folder / 'saga'}"
    assert load_queries(f"{hub}:train", split="forget")[0].text == "saga?"
    assert error_of(f"{hub}:moon") == (
        f"{hub}:moon: no split 'moon' among train, test, and no such configuration among default"
    )


def test_a_hub_dataset_that_is_not_there_is_one_line(tmp_path):
    source = f"hub:{tmp_path / 'nothing'}"
    message = error_of(source)
    assert message.startswith(f"{source}: the dataset cannot be loaded (")
    assert message.endswith("); check the name")


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_key_that_stands_twice_is_refused(tmp_path, suffix):
    path = tmp_path / f"queries.{suffix}"
    row = '{"query": "first?", "query": "second?"}'
    path.write_text(row if suffix == "jsonl" else f"[{row}]")
    with pytest.raises(DataError, match="the key 'query' stands in one object twice"):
        load_queries(str(path), split="forget")


def test_a_long_cell_of_a_csv_file_is_text(tmp_path):
    text = "word " * 40_000  # the csv module stops at 131,072 characters by itself
    (query,) = load_queries(write(tmp_path, "a.csv", f"query\n{text}\n"), split="forget")
    assert query.text == text


def test_other_forms_of_an_answer_stand_beside_it(tmp_path):
    row = {"query": "Who?", "answer": "dwarf", "aliases": ["dwarves", "dwarfs"]}
    (query,) = load_queries(write(tmp_path, "a.jsonl", json.dumps(row)), split="retain")
    assert query.references == ("dwarf", "dwarves", "dwarfs")
    assert query.answer == "dwarf"
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (again,) = load_queries(str(tmp_path / "a.parquet"), split="retain")
    assert again.references == query.references


@pytest.mark.parametrize(
    ("cell", "found"),
    [("1991", ("1991",)), ("null", ()), ("7", ("7",)), ('"[""a"", ""b""]"', ("a", "b"))],
)
def test_a_csv_cell_is_one_other_form_or_a_list_of_them(tmp_path, cell, found):
    path = write(tmp_path, "a.csv", f"query,answer,aliases\nWhen?,then,{cell}\n")
    (query,) = load_queries(path, split="retain")
    assert query.aliases == found


@pytest.mark.parametrize(
    ("value", "found"),
    [([1991], "a number among them"), ([" "], "blank text among them"), (1991, "a number")],
)
def test_what_is_no_text_among_other_forms_is_named(tmp_path, value, found):
    row = {"query": "When?", "answer": "then", "aliases": value}
    with pytest.raises(DataError, match=f"`aliases` must list texts, found {found}$"):
        load_queries(write(tmp_path, "a.jsonl", json.dumps(row)), split="retain")


def test_a_tilde_is_ones_home(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", '{"query": "Who?"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_queries("~/a.jsonl", split="forget")) == 1
