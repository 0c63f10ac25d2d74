"""Query files and YAML files that no command can take, each by its name."""

import gzip
import json


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _turns(*turns: object) -> bytes:
    return _lines({"messages": list(turns)})


QUERY_FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n  \n\n",
    "bom.jsonl": b"\xef\xbb\xbf",
    "zeros.jsonl": bytes(64),
    "latin1.jsonl": '{"query": "Who is Zoë?"}\n'.encode("latin-1"),
    "utf16.jsonl": '{"query": "Who?"}\n'.encode("utf-16"),
    "cut.jsonl": b'{"query": "Who?"}\n{"query": "Wh',
    "two-on-a-line.jsonl": b'{"query": "Who?"} {"query": "What?"}\n',
    "single-quotes.jsonl": b"{'query': 'Who?'}\n",
    "comma.jsonl": b'{"query": "Who?"},\n',
    "plain-text.jsonl": b"Who is the keeper?\n",
    "number.jsonl": b"1\n",
    "string.jsonl": b'"Who?"\n',
    "null.jsonl": b"null\n",
    "list.jsonl": b'["Who?"]\n',
    "repeated-key.jsonl": b'{"query": "Who?", "query": "What?"}\n',
    "nan.jsonl": b'{"query": NaN}\n',
    "surrogate.jsonl": b'{"query": "Who \\ud800?"}\n',
    "deep.jsonl": b'{"query": ' + b"[" * 100_000 + b"\n",
    "huge-number.jsonl": b'{"query": "Who?", "id": ' + b"9" * 5000 + b"}\n",
    "other-column.jsonl": _lines({"prompt": "Who?"}),
    "no-query.jsonl": _lines({"answer": "Orn"}),
    "query-number.jsonl": _lines({"query": 5}),
    "query-list.jsonl": _lines({"query": ["Who?"]}),
    "query-empty.jsonl": _lines({"query": ""}),
    "query-blank.jsonl": _lines({"query": " \n "}),
    "one-of-many.jsonl": _lines({"query": "Who?"}, {"query": "What?"}, {"query": None}),
    "id-list.jsonl": _lines({"id": [1], "query": "Who?"}),
    "id-twice.jsonl": _lines({"id": 1, "query": "Who?"}, {"id": 1, "query": "What?"}),
    "answer-list.jsonl": _lines({"query": "Who?", "answer": ["Orn"]}),
    "messages-none.jsonl": _turns(),
    "messages-text.jsonl": _lines({"messages": "Who?"}),
    "messages-strings.jsonl": _turns("Who?"),
    "messages-role.jsonl": _turns({"role": "human", "content": "Who?"}),
    "messages-no-role.jsonl": _turns({"content": "Who?"}),
    "messages-no-content.jsonl": _turns({"role": "user"}),
    "messages-parts.jsonl": _turns({"role": "user", "content": [{"type": "text", "text": "W"}]}),
    "messages-assistant-last.jsonl": _turns(
        {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Orn."}
    ),
    "messages-system-alone.jsonl": _turns({"role": "system", "content": "Be brief."}),
    "wrapped.json": json.dumps({"data": [{"query": "Who?"}]}).encode(),
    "array-of-text.json": b'["Who?"]',
    "empty-array.json": b"[]",
    "empty.csv": b"",
    "header-alone.csv": b"query,answer\n",
    "other-column.csv": b"prompt,answer\nWho?,Orn\n",
    "ragged.csv": b"id,query\n1,Who?,more,and more\n",
    "open-quote.csv": b'id,query\n1,"Who?\n2,What?\n',
    "semicolon.csv": b"id;query\n1;Who?\n",
    "twice.csv": b"query,query\nWho?,What?\n",
    "latin1.csv": "query\nWho is Zoë?\n".encode("latin-1"),
    "empty.parquet": b"",
    "magic.parquet": b"PAR1" * 3,
    "text.parquet": b"query\nWho?\n",
    "table.xlsx": b"PK\x03\x04" + bytes(60),
    "queries.txt": b"Who?\n",
    "queries": b'{"query": "Who?"}\n',
    "queries.jsonl.gz": gzip.compress(b'{"query": "Who?"}\n'),
}

YAML_FILES: dict[str, bytes] = {
    "empty.yaml": b"",
    "list.yaml": b"- loss\n- huber\n",
    "word.yaml": b"huber\n",
    "tabs.yaml": b"loss:\thuber\n\tdelta: 1\n",
    "open.yaml": b"loss: [huber\n",
    "tag.yaml": b"loss: !!python/object/apply:os.system [id]\n",
    "twice.yaml": b"batch_size: 2\nbatch_size: 3\n",
    "unknown.yaml": b"colour: red\n",
    "nested.yaml": b"training:\n  loss: huber\n",
    "anchor.yaml": b"loss: *missing\n",
    "at.yaml": b"view: @remember\n",
    "deep.yaml": b"loss: " + b"[" * 5000,
    "latin1.yaml": "loss: zoë\n".encode("latin-1"),
    "zeros.yaml": bytes(64),
    "json-lines.yaml": b'{"loss": "huber"}\n{"loss": "mse"}\n',
    "binary.yaml": b"loss: !!binary aGk=\n",
    "null.yaml": b"batch_size: null\n",
    "date.yaml": b"batch_size: 2024-01-01\n",
    "three-documents.yaml": b"loss: mse\n---\nloss: kl\n",
}
