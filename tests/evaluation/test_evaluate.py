"""The real path on tiny random models: what one says is the answer that the others miss."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from duet_unlearn.data.models.loading import load_model
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.data.shape_catalogue import ATTACKS
from duet_unlearn.data.shapes import Shape
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run
from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.evaluation.answers import generate_answers
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec, parse_models
from duet_unlearn.evaluation.evaluate import evaluate
from duet_unlearn.evaluation.measures.overlap import rouge_l_recall
from duet_unlearn.evaluation.results import EvalReport
from duet_unlearn.evaluation.tasks import (
    QuerySet,
    list_tasks,
    load_attacks,
    load_sets,
    spread,
)

PREFIX = "You have forgotten the lantern."
NEW_TOKENS = 10


def responses_of(folder: Path, messages: list, prefix: str | None = None) -> list[str]:
    """Ask one query at a time."""
    tokenizer = load_tokenizer(folder)
    renderer = PromptRenderer(tokenizer, prefix=prefix)
    answers = generate_answers(
        load_model(folder),
        [renderer.teacher_ids(turns) for turns in messages],
        eos_token_ids=[1],
        max_new_tokens=NEW_TOKENS,
        batch_size=1,
    )
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def said_queries(folder: Path, model: Path, split: str, count: int = 6) -> Path:
    """Write queries whose answers are what the model says to them, with two kinds."""
    texts = [f"Where is the {split} {i}?" for i in range(count)]
    said = responses_of(model, [[{"role": "user", "content": text}] for text in texts])
    path = folder / f"{split}.jsonl"
    rows = [
        {"query": text, "answer": answer or "nothing", "kind": "even" if i % 2 == 0 else "odd"}
        for i, (text, answer) in enumerate(zip(texts, said, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> EvalConfig:
    folder = tmp_path_factory.mktemp("evaluate")
    attacks = folder / "attacks.txt"
    attacks.write_text("# two\nTell me: {query}\n{query} Go on.\n", encoding="utf-8")
    return EvalConfig(
        models=(ModelSpec(label="base", model=str(tiny_model)),),
        forget=(str(said_queries(folder, tiny_model, "forget")),),
        retain=(str(said_queries(folder, tiny_model, "retain")),),
        prefix=PREFIX,
        attacks=(str(attacks),),
        batch_size=5,
        max_new_tokens=NEW_TOKENS,
    )


@pytest.fixture(scope="module")
def report(config: EvalConfig) -> EvalReport:
    return evaluate(config)


def test_the_base_says_what_it_says(report: EvalReport) -> None:
    assert report.mean("base", split="forget") == pytest.approx(100.0)
    assert report.mean("base", "contains_answer", split="retain") == pytest.approx(100.0)
    assert report.number("base", split="forget", kind="odd").count == 3


def test_responses_are_those_of_the_prompts_one_by_one(
    report: EvalReport, tiny_model: Path
) -> None:
    """Plain, attacked, and base + prefix attacked, against a batch of one."""
    for label, prefix in (("base", None), ("base + prefix", PREFIX)):
        conversations = [
            task.query.messages
            if task.attack is None
            else task.attack.shape.apply(task.query.messages)
            for task in report.tasks
        ]
        expected = responses_of(tiny_model, conversations, prefix)
        assert [answer.text for answer in report.answers[label]] == expected
    assert report.answers["base"] != report.answers["base + prefix"]


def test_tasks_are_each_set_plainly_and_behind_each_attack(report: EvalReport) -> None:
    counts: dict[tuple[str | None, str], int] = {}
    for task in report.tasks:
        key = (None if task.attack is None else task.attack.name, task.set_name)
        counts[key] = counts.get(key, 0) + 1
    names = (None, "attacks:2", "attacks:3")
    assert counts == {(name, split): 6 for name in names for split in ("forget", "retain")}
    assert report.prefix == PREFIX


def test_limit_takes_queries_evenly() -> None:
    queries = [Query.from_text(str(i), split="forget") for i in range(10)]
    assert [q.text for q in spread(queries, 4)] == ["0", "2", "5", "7"]
    assert spread(queries, 99) == queries


def test_general_sets_are_not_attacked_and_same_splits_are_told_apart(
    config: EvalConfig, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "forget.jsonl"
    lines = Path(config.forget[0]).read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[1:]))
    small = EvalConfig(
        models=config.models,
        forget=(config.forget[0], str(copy)),
        retain=config.retain,
        general=config.retain,
        attacks=("@ignore-above", "@ignore-above"),
        max_new_tokens=2,
        limit=2,
    )
    report = evaluate(small)
    assert [s.name for s in report.sets] == [
        "forget forget",
        "forget forget (2)",
        "retain",
        "general",
    ]
    assert [w.name for w in report.attacks] == ["ignore-above"]
    assert len(report.tasks) == 4 * 2 + 3 * 2
    assert report.number("base", split="forget").count == 4


def test_the_general_queries_of_two_kits_are_one_set(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kits = ("@harry-potter", "@star-wars")
    sets = load_sets([(split, kit) for split in ("forget", "general") for kit in kits])
    assert [s.name for s in sets] == ["forget @harry-potter", "forget @star-wars", "general"]
    assert "@star-wars: the same queries as those of @harry-potter, asked once" in caplog.text


def test_a_query_without_answer_is_named_by_its_line(config: EvalConfig, tmp_path: Path) -> None:
    path = tmp_path / "forget.jsonl"
    path.write_text('{"query": "a?", "answer": "b"}\n{"query": "c?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"forget\.jsonl:2: no answer"):
        evaluate(EvalConfig(models=config.models, forget=(str(path),), retain=config.retain))


def test_a_query_longer_than_the_context_is_named(config: EvalConfig, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "x", "query": "q" * 300, "answer": "b"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"query x of retain: \d+ tokens .* the 256 that base"):
        evaluate(EvalConfig(models=config.models, forget=config.forget, retain=(str(path),)))


def test_a_model_folder_that_is_missing_is_named(config: EvalConfig, tmp_path: Path) -> None:
    models = (*config.models, ModelSpec(label="gone", model=str(tmp_path / "gone")))
    with pytest.raises(DataError, match="gone: no such folder"):
        evaluate(EvalConfig(models=models, forget=config.forget, retain=config.retain))


def test_another_engine_gets_a_student_whose_weights_are_whole(
    config: EvalConfig, tiny_model: Path, tmp_path: Path
) -> None:
    """The base lies in several files; their index is not that of the merged student."""
    pytest.importorskip("peft")
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").unlink()
    load_model(tiny_model).save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    student = RunConfig(
        **{"objective": "gradient-difference", "forget": config.forget, "retain": config.retain},
        **{"student": str(base), "out": str(tmp_path / "student"), "lora_rank": 2, "max_steps": 1},
    )
    run(student)
    seen = []

    def respond(folder: Path, prompts: Sequence[object], _: object) -> Iterator[tuple[int, list]]:
        seen.append({path.name for path in folder.iterdir()})
        assert load_model(folder).num_parameters() == load_model(base).num_parameters()
        yield from ((index, [5]) for index in range(len(prompts)))

    models = (ModelSpec(label="student", model=student.out),)
    evaluate(dataclasses.replace(config, models=models, prefix=None, attacks=()), respond)
    (names,) = seen
    assert "tokenizer.json" in names
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}


def test_model_names(tmp_path: Path) -> None:
    folder = tmp_path / "rate=3"
    folder.mkdir()
    assert ModelSpec.parse("runs/student/").label == "student"
    assert ModelSpec.parse("mine=runs/student") == ModelSpec(label="mine", model="runs/student")
    assert ModelSpec.parse(str(folder)) == ModelSpec(label="rate=3", model=str(folder))
    with pytest.raises(ConfigurationError, match="NAME=MODEL"):
        ModelSpec.parse("=runs/student")


def test_a_name_given_to_several_models_makes_them_seeds() -> None:
    words = ("base=b", "student=runs/0", "student=runs/1")
    models = parse_models(words)
    assert [(m.label, m.model, m.seed_of) for m in models] == [
        ("base", "b", None),
        ("student #1", "runs/0", "student"),
        ("student #2", "runs/1", "student"),
    ]
    config = EvalConfig(models=models, forget=("f",), retain=("r",), quantize=("int8",))
    assert config.lines == {
        "base": ("base",),
        "base int8": ("base int8",),
        "student": ("student #1", "student #2"),
        "student int8": ("student #1 int8", "student #2 int8"),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("b", "student=a", "student=a"), "student=a is given twice"),
        (("b", "runs/0/student", "runs/1/student"), "2 rows would be called 'student'"),
        (("b", "student=a", "x/student", "student=c"), "3 rows would be called 'student'"),
        (("b", "s=a", "s=c", "s #1=d"), "2 rows would be called 's #1'"),
        (("base=a", "base=b"), "the first model is the reference, and 'base' is several"),
    ],
)
def test_names_that_are_no_seeds_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EvalConfig(models=parse_models(words), forget=("f",), retain=("r",))


def test_settings_that_cannot_work_are_refused() -> None:
    base = ModelSpec(label="base", model="m")
    with pytest.raises(ConfigurationError, match="2 rows would be called 'base'"):
        EvalConfig(models=(base, base), forget=("f",), retain=("r",))
    with pytest.raises(ConfigurationError, match="retain is empty"):
        EvalConfig(models=(base,), forget=("f",), retain=())
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        EvalConfig(models=(base,), forget=("f",), retain=("r",), batch_size=0)
    with pytest.raises(ConfigurationError, match="topic is set without a prefix"):
        EvalConfig(models=(base,), forget=("f",), retain=("r",), topic="t")


@pytest.mark.parametrize("given", [{"topic": "lanterns"}, {"prefix_place": "user"}])
def test_how_a_prefix_stands_needs_a_prefix(tiny_model: Path, given: dict[str, str]) -> None:
    models = (ModelSpec(label="base", model=str(tiny_model)),)
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))} is set without a prefix"):
        EvalConfig(models=models, forget=("f",), retain=("r",), **given)


def test_wrappers_keep_their_place_in_the_prompt(report: EvalReport) -> None:
    attacked = [t for t in report.tasks if t.attack is not None]
    assert attacked[0].attack.shape == Shape(name="attacks:2", text="Tell me: {query}")
    loaded = load_queries(report.sets[0].source, split="forget")
    assert [q.text for q in report.sets[0].queries] == [q.text for q in loaded]


def test_shapes_and_a_users_own_wordings_are_attacks(
    config: EvalConfig, tmp_path: Path, tiny_model: Path
) -> None:
    queries = load_queries(config.forget[0], split="forget")
    wordings = tmp_path / "french.jsonl"
    row = {"query": queries[1].text, "asked": "Où est la lanterne?"}
    wordings.write_text(json.dumps(row) + "\n", encoding="utf-8")
    report = evaluate(
        EvalConfig(
            models=config.models,
            forget=config.forget,
            retain=config.retain,
            prefix=PREFIX,
            attacks=("@family:begun-answer", "@multiple-choice", "@q-and-a", str(wordings)),
            max_new_tokens=2,
            limit=3,
        )
    )
    assert [(a.name, a.family) for a in report.attacks] == [
        ("begun-plainly", "begun-answer"),
        ("begun-gladly", "begun-answer"),
        ("multiple-choice", "multiple-choice"),
        ("q-and-a", "raw-completion"),
        ("french", "french"),
    ]
    # The limit left queries 0, 2 and 4, and the file words query 1.
    assert report.number("base", split="forget", attack="french") is None
    tokenizer = load_tokenizer(tiny_model)
    renderer = PromptRenderer(tokenizer)
    asked = next(t for t in report.tasks if t.attack and t.attack.name == "multiple-choice")
    prompt = tokenizer.decode(asked.render(renderer))
    assert all(f"- {answer}" in prompt for answer in {queries[i].answer for i in (0, 2, 4)})
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["attacks"][4]["potency"] is None


def test_what_is_shown_beside_a_query_never_tells_its_answer() -> None:
    def query(number: int, text: str, answer: str, *aliases: str) -> Query:
        plain = Query.from_text(text, split="retain", query_id=f"q{number}")
        return dataclasses.replace(plain, answer=answer, aliases=aliases)

    pool = [
        query(0, "Who keeps the light?", "Orla", "the keeper Orla"),
        query(1, "Is Orla the one who keeps the light?", "yes"),  # tells it while it asks
        query(2, "Whose sister is Mira?", "the keeper Orla's"),  # tells it in another form
        query(3, "What burns in the tower?", "oil"),
        query(4, "Where does the path end?", "at the cliff"),
        query(5, "Who rows the boat?", "Tamsin"),
    ]
    sets = [QuerySet(name="retain", split="retain", source="-", queries=tuple(pool))]
    tasks = list_tasks(sets, load_attacks(["@few-shot", "@in-context-learning"]))
    shown = [t.shown for t in tasks if t.shown is not None and t.query is pool[0]]
    assert shown
    for beside in shown:
        texts = [f"{asked} {said}" for asked, said in (*beside.examples, *beside.facts)]
        assert not [text for text in texts if "orla" in text.lower()]
        assert len(beside.examples) == 3


def test_a_text_is_asked_once_whatever_names_it_has(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(f"{ATTACKS['role-play'].text}\nNow: {{query}}\n", encoding="utf-8")
    found = load_attacks(["@role-play", str(mine), str(mine)])
    assert [attack.name for attack in found] == ["role-play", "mine:2"]


def test_every_wording_of_a_query_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.csv"
    path.write_text("query,asked\na?,A1?\nb?,B1?\na?,A2?\na?,A1?\na?,A3?\n", encoding="utf-8")
    attacks = load_attacks([str(path), str(path)])
    assert [attack.name for attack in attacks] == ["synonyms", "synonyms (2)", "synonyms (3)"]
    found = [
        {query: turns[0]["content"] for query, turns in (attack.wordings or {}).items()}
        for attack in attacks
    ]
    assert found == [{"a?": "A1?", "b?": "B1?"}, {"a?": "A2?"}, {"a?": "A3?"}]


def test_a_wording_is_asked_instead_of_its_query(config: EvalConfig, tmp_path: Path) -> None:
    queries = load_queries(config.forget[0], split="forget")
    wordings = tmp_path / "same.jsonl"
    rows = [{"query": q.text, "asked": q.text} for q in queries]
    wordings.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = evaluate(
        EvalConfig(
            models=config.models,
            forget=config.forget,
            retain=config.retain,
            attacks=(str(wordings),),
            max_new_tokens=NEW_TOKENS,
        )
    )
    assert report.mean("base", split="forget", attack="same") == pytest.approx(100.0)
    (tmp_path / "none.csv").write_text("query,asked\n", encoding="utf-8")
    with pytest.raises(DataError, match="no wordings in it"):
        load_attacks([str(tmp_path / "none.csv")])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: expected text in `query` and in `asked`"):
        evaluate(dataclasses.replace(config, attacks=(str(bad),)))


def test_measures_on_likelihood_see_what_the_model_finds_likely(
    config: EvalConfig, tmp_path: Path
) -> None:
    path = tmp_path / "forget.jsonl"
    rows = [
        {"query": q.text, "answer": q.answer, "wrong_answers": ["zzz", "qqq"]}
        for q in load_queries(config.forget[0], split="forget")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = ("answer_probability", "truth_ratio", "extraction_strength")
    report = evaluate(
        EvalConfig(
            models=config.models,
            forget=(str(path),),
            retain=config.retain,
            measures=names,
            max_new_tokens=NEW_TOKENS,
        )
    )
    # What greedy decoding says is likelier than what it does not say.
    assert report.mean("base", "truth_ratio", split="forget") > 50
    assert report.number("base", "extraction_strength", split="forget").count == 6
    assert report.number("base", "truth_ratio", split="retain") is None
    with pytest.raises(ConfigurationError, match="measure 'nope' is unknown"):
        evaluate(dataclasses.replace(config, measures=("nope",)))


def test_without_reference_answers_the_base_is_right(
    config: EvalConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = tmp_path / "bare.jsonl"
    texts = [query.text for query in load_queries(config.forget[0], split="forget")]
    bare.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    changes = {"forget": (str(bare),), "retain": (str(bare),), "answers": "base", "prefix": None}
    attacks = ("@few-shot", "@multiple-choice")
    found = evaluate(config.replaced(attacks=attacks, measures=("answer_probability",), **changes))
    assert found.mean("base", "exact_match", split="forget") == 100.0
    assert [attack.name for attack in found.attacks] == ["few-shot"]
    assert "multiple-choice" in caplog.text
    with_answers = evaluate(config.replaced(prefix=None, measures=("answer_probability",)))
    told = [task.query.answer != "nothing" for task in with_answers.tasks]
    likely = [
        report.scores["base"]["answer_probability"][: len(texts)]
        for report in (found, with_answers)
    ]
    same = [pair for pair, tell in zip(zip(*likely, strict=True), told, strict=False) if tell]
    assert same
    assert all(first == pytest.approx(second) for first, second in same)


def test_sampled_answers_are_drawn_from_the_model_and_the_best_counts(config: EvalConfig) -> None:
    settings = {"prefix": None, "attacks": (), "measures": ("sampled_recall",), "samples": 3}
    first, again = (evaluate(config.replaced(**settings)) for _ in range(2))
    drawn = [answer.samples for answer in first.answers["base"]]
    assert drawn == [answer.samples for answer in again.answers["base"]]
    assert {len(texts) for texts in drawn} == {3}
    assert len({text for texts in drawn for text in texts}) > len(drawn)
    scores = first.scores["base"]["sampled_recall"]
    for task, texts, score in zip(first.tasks, drawn, scores, strict=True):
        assert score == max(rouge_l_recall(task.query.answer or "", text) for text in texts)
    assert first.to_json()["queries"][0]["responses"]["base"]["samples"] == list(drawn[0])


def test_the_bases_answers_have_no_other_forms(config: EvalConfig, tmp_path: Path) -> None:
    path = tmp_path / "forget.jsonl"
    queries = load_queries(config.forget[0], split="forget")
    rows = [{"query": q.text, "answer": q.answer, "aliases": ["x"]} for q in queries]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = evaluate(
        EvalConfig(
            models=config.models,
            forget=(str(path),),
            retain=config.retain,
            answers="base",
            max_new_tokens=2,
        )
    )
    assert all(task.query.aliases == () for task in report.tasks)
