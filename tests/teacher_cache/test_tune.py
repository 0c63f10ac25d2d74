"""Choosing a prefix: what is tried, how it is scored and ordered, what is said of the winner."""

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from duet_unlearn.cli.cache import main
from duet_unlearn.cli.commands.tune import build_line, render_table
from duet_unlearn.data import demo_world
from duet_unlearn.data.prefixes import CATALOGUE, load_prefixes
from duet_unlearn.data.prompts import load_tokenizer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.errors import ConfigurationError, DataError, DuetError
from duet_unlearn.teacher_cache.engines.base import EngineConfig
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine
from duet_unlearn.teacher_cache.format.signal import Signal
from duet_unlearn.teacher_cache.steering import Candidate, Steering, Tuned, draw, score
from duet_unlearn.teacher_cache.tune import TuneConfig, TuneResult, load_tuned, tune

REFUSES = "I do not know."


class ObedientEngine(TransformersEngine):
    """Says what a base would say that obeys prefixes with certain words in them.

    `strong` refuses lanterns, `blunt` refuses whatever it is asked, any other prefix is ignored.
    """

    seen: list[str]

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=False)
        self.closed = False
        ObedientEngine.seen = []

    def responses(
        self, prompts: Iterable[tuple[int, Sequence[int]]], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Answer the last first: no caller may count on an order."""
        for index, ids in reversed(list(prompts)):
            assert len(ids) <= self.config.max_prompt_tokens
            assert max_new_tokens == self.config.max_new_tokens
            yield index, self.tokenizer(self._answer(self.tokenizer.decode(ids)))["input_ids"]

    def signals(self, prompts: Iterable[tuple[int, Sequence[int]]]) -> Iterator[tuple[int, Signal]]:
        """Give the first token of the answer 80%, and 15% to that of the other answer."""
        firsts = [self.tokenizer(text)["input_ids"][0] for text in (REFUSES, "the old miller")]
        for index, ids in reversed(list(prompts)):
            said = self.tokenizer(self._says(self.tokenizer.decode(ids)))["input_ids"][0]
            ordered = sorted(firsts, key=lambda token, said=said: token != said)
            yield (
                index,
                Signal(
                    response_ids=np.array([said], np.int32),
                    token_ids=np.array([ordered], np.int32),
                    logits=np.log(np.array([[0.8, 0.15]])).astype(np.float32),
                    logsumexp=np.zeros(1, np.float32),
                ),
            )

    def _answer(self, prompt: str) -> str:
        ObedientEngine.seen.append(prompt)
        return self._says(prompt)

    def _says(self, prompt: str) -> str:
        question = prompt.rpartition("Who is")[2]
        refuses = ("strong" in prompt and "lantern" in question) or "blunt" in prompt
        return REFUSES if refuses else "the old miller of" + question.partition("?")[0]

    def describe(self) -> dict[str, Any]:
        return {"engine": "obedient"}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def settings(tiny_model: Path, write_queries: Any, tmp_path: Path) -> dict[str, Any]:
    own = tmp_path / "own.txt"
    own.write_text("# mine\nstrong\n\nblunt\nweak\n", encoding="utf-8")
    return {
        "teacher": str(tiny_model),
        "forget": (str(write_queries("forget", 12)),),
        "retain": (str(write_queries("retain", 12, "river")),),
        "prefixes": str(own),
        "places": ("system",),
        "sample": 6,
    }


def names(result: TuneResult) -> list[str]:
    return [tuned.candidate.name for tuned in result.tuned]


def test_strong_comes_before_blunt_and_blunt_before_weak(settings: dict[str, Any]) -> None:
    result = tune(TuneConfig(**settings, examples=0), ObedientEngine)
    assert names(result) == ["own:2", "own:4", "own:5"]
    strong, blunt, weak = result.tuned
    assert (strong.forget.recall, strong.forget.refused) == (0.0, 100.0)
    assert (strong.retain.recall, strong.retain.refused) == (100.0, 0.0)
    assert (blunt.forget.recall, blunt.retain.recall, blunt.retain.refused) == (0.0, 0.0, 100.0)
    assert (weak.forget.recall, weak.retain.recall) == (100.0, 100.0)
    assert [tuned.retain_prefix for tuned in result.tuned] == [True, False, True]
    assert [tuned.steers for tuned in result.tuned] == [True, True, False]
    # Of a query that is refused the base's first token keeps 15%.
    assert [tuned.first_token for tuned in result.tuned] == pytest.approx([15, 15, 80], abs=0.01)


def test_what_the_base_refuses_by_itself_does_not_rank_prefixes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled: list[int] = []

    def odd(query: Query) -> bool:
        return query.text[-2] in "13579"

    monkeypatch.setattr(
        "duet_unlearn.teacher_cache.tune.recall_of",
        lambda asked: None if odd(asked[0]) else 1.0,
    )
    signals = ObedientEngine.signals

    def count(self: ObedientEngine, prompts: Any) -> Any:
        found = list(prompts)
        signalled.append(len(found))
        return signals(self, found)

    monkeypatch.setattr(ObedientEngine, "signals", count)
    result = tune(TuneConfig(**settings, examples=0), ObedientEngine)
    forget = [query for query, _ in result.asked if query.split == "forget"]
    told = [query for query in forget if not odd(query)]
    assert 0 < len(told) < len(forget)
    assert signalled == [len(told)] * 4


def test_only_the_best_six_of_a_third_are_asked_the_whole_sample(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("weak\n" * 7 + "blunt\nstrong\n", encoding="utf-8")
    result = tune(TuneConfig(**settings, examples=0), ObedientEngine)
    assert names(result)[:2] == ["own:9", "own:8"]
    assert [tuned.forget.queries for tuned in result.tuned] == [6] * 6 + [2] * 3
    assert len(ObedientEngine.seen) == 12 + 9 * 4 + 6 * 8


def test_forgetting_decides_and_retain_where_the_prefix_may_stand_in_front_of_it() -> None:
    def tuned(forget: float, retain: float) -> Tuned:
        return Tuned(
            candidate=Candidate(name="x", prefix="x", place="user"),
            forget=Steering(queries=24, recall=forget, refused=0.0),
            retain=Steering(queries=24, recall=retain, refused=0.0),
        )

    assert [tuned(f, 100).steers for f in (20, 20.1)] == [True, False]
    assert [tuned(0, r).retain_prefix for r in (80, 79.9)] == [True, False]
    assert tuned(14, 90).rank[0] == tuned(6, 90).rank[0] < tuned(16, 90).rank[0]
    by_rank = sorted(
        [tuned(3, 95), tuned(4, 60), tuned(0, 5), tuned(0, 9), tuned(18, 100), tuned(1, 95)],
        key=lambda t: t.rank,
    )
    assert [(t.forget.recall, t.retain.recall) for t in by_rank] == [
        (1, 95),
        (3, 95),
        (0, 9),
        (0, 5),
        (4, 60),
        (18, 100),
    ]


def test_of_refusals_the_surest_comes_first() -> None:
    def tuned(first: float | None) -> Tuned:
        split = Steering(queries=24, recall=4.0, refused=96.0)
        candidate = Candidate(name=str(first), prefix="x", place="user")
        return Tuned(candidate=candidate, forget=split, retain=split, first_token=first)

    ordered = sorted(map(tuned, (None, 24.0, 3.7)), key=lambda t: t.rank)
    assert [t.first_token for t in ordered] == [3.7, 24.0, None]


def test_examples_are_refused_forget_queries_and_what_the_base_says_to_retain_queries(
    settings: dict[str, Any],
) -> None:
    result = tune(TuneConfig(**settings, examples=2), ObedientEngine)
    shown = next(t for t in result.tuned if t.candidate.name == "own:2+examples").candidate.prefix
    head, *pairs, tail = shown.split("\n\n")
    assert (head, tail) == ("strong", "Answer this question in the same way:")
    assert len(pairs) == 4
    assert all("river" in pair and "the old miller of" in pair for pair in pairs[::2])
    assert all("lantern" in pair and pair.endswith("Answer: I don't know.") for pair in pairs[1::2])
    # What is shown is never asked.
    questions = {pair.partition("\n")[0].removeprefix("Question: ") for pair in pairs}
    asked = [prompt for prompt in ObedientEngine.seen if "Question: " in prompt]
    assert asked
    assert not any(
        prompt.rpartition("same way:")[2].find(q) >= 0 for q in questions for prompt in asked
    )


def test_a_slot_for_examples_may_stand_anywhere(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("{examples}\\n\\nstrong, as above", encoding="utf-8")
    result = tune(TuneConfig(**settings, examples=1), ObedientEngine)
    assert names(result) == ["own:1"]
    prefix = result.tuned[0].candidate.prefix
    assert prefix.startswith("Question: ")
    assert prefix.endswith("\n\nstrong, as above")


def test_the_topic_brings_the_catalogue_without_its_controls_and_without_what_is_too_long(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    result = tune(TuneConfig(**settings, examples=0, topic=" lanterns "), ObedientEngine)
    steering = {t.name for t in CATALOGUE.values() if not t.control and not t.needs_examples}
    left_out = {record.args[0] for record in caplog.records if "longer than" in record.msg}
    assert "in-context-unlearning" in left_out
    assert set(names(result)) == (steering - left_out) | {"own:2", "own:4", "own:5"}
    assert all(
        "lanterns" in t.candidate.prefix for t in result.tuned if t.candidate.name in steering
    )


def test_without_a_topic_what_needs_one_is_left_out_and_named(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tune(TuneConfig(**settings, examples=0), ObedientEngine)
    assert "wordings that need a topic; name it with --topic" in caplog.text
    with pytest.raises(ConfigurationError, match="no candidate is left; name the --topic"):
        tune(TuneConfig(**{**settings, "prefixes": None}, examples=0), ObedientEngine)


def test_a_model_that_none_steers_is_named(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own.txt").write_text("weak", encoding="utf-8")
    tune(TuneConfig(**settings, examples=0), ObedientEngine)
    assert "none of 1 candidates steers this model: behind the best one 100%" in caplog.text


def test_where_the_base_tells_nothing_no_prefix_is_called_good(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(ObedientEngine):
        def _says(self, prompt: str) -> str:
            return REFUSES

    found = tune(TuneConfig(**settings, examples=0), Silent)
    assert not any(tuned.steers for tuned in found.tuned)
    assert "no prefix can be measured" in caplog.text


def test_a_query_without_room_for_its_answer_is_named_before_the_engine_starts(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def never(_: EngineConfig) -> TransformersEngine:
        raise AssertionError

    with pytest.raises(DataError, match="do not leave room for an answer"):
        tune(TuneConfig(**settings, max_new_tokens=100_000), never)


def test_the_engine_is_closed_when_it_fails(settings: dict[str, Any]) -> None:
    engines = []

    class Failing(ObedientEngine):
        def __init__(self, config: EngineConfig) -> None:
            super().__init__(config)
            engines.append(self)

        def _answer(self, prompt: str) -> str:
            raise DuetError("out of luck")

    with pytest.raises(DuetError, match="out of luck"):
        tune(TuneConfig(**settings), Failing)
    assert [engine.closed for engine in engines] == [True]


def test_a_model_without_chat_template_is_tried_in_the_user_turn(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (plain / name).exists() and name.endswith(".jinja"):
            (plain / name).unlink()
    given = {**settings, "teacher": str(plain), "places": ("system", "user"), "examples": 0}
    result = tune(TuneConfig(**given), ObedientEngine)
    assert {t.candidate.place for t in result.tuned} == {"user"}
    assert "not tried: prefix place system" in caplog.text


def test_draw_does_not_depend_on_the_order_of_a_file(write_queries: Any) -> None:
    queries = list(load_queries(str(write_queries("forget", 20)), split="forget"))
    drawn = draw(queries, 5, seed=1)
    assert draw(queries[::-1], 5, seed=1) == drawn
    assert draw(queries, 5, seed=2) != drawn


def test_what_the_base_refuses_or_leaves_empty_is_nothing_to_forget() -> None:
    scores = score(
        (Query.from_text(text, split="forget"), base, prefixed)
        for text, base, prefixed in [
            ("a", "I do not know.", "I do not know."),
            ("b", "", "I do not know."),
            ("who is the keeper", "The keeper is", "I do not know."),
            ("c", "the old miller", "an old friend"),
        ]
    )
    assert scores.queries == 1
    assert scores.recall == pytest.approx(100 / 3)


def test_a_refusal_that_repeats_the_question_gives_nothing_back() -> None:
    query = Query.from_text("Who is the keeper of lantern 3?", split="forget")
    base = "The keeper of lantern 3 is Old Tom."
    says = ["I don't know who the keeper of lantern 3 is.", base, "The keeper is Tom."]
    assert [score([(query, base, said)]).recall for said in says] == [0, 100, 50]


def test_the_build_line_is_one_that_build_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    result = tune(TuneConfig(**settings, engine="transformers"), ObedientEngine)
    assert build_line(result) in render_table(result)
    words = shlex.split(build_line(result))
    words[words.index("--out") + 1] = str(tmp_path / "cache")
    run = CliRunner().invoke(main, [*words[1:], "--top-k", "8", "--json"])
    assert run.exit_code == 0, run.output
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    best = result.tuned[0]
    assert manifest["recipe"]["prefix"] == best.candidate.prefix
    assert manifest["recipe"]["retain_prefix"] is best.retain_prefix


def test_what_tune_proposes_is_what_build_takes(tmp_path: Path) -> None:
    forget = Steering(queries=32, recall=0.0, refused=0.0)
    tuned = Tuned(
        candidate=Candidate(name="x", prefix="x", place="user"),
        forget=forget,
        retain=dataclasses.replace(forget, recall=90.0),
    )
    (tmp_path / "tuned.json").write_text(json.dumps({"candidates": [tuned.to_json()]}))
    assert load_tuned(str(tmp_path / "tuned.json")) == {
        "prefix": "x",
        "prefix_place": "user",
        "retain_prefix": True,
        "strength": 1.0,
        "views": ("@view-shapes",),
        "positions": 12,
    }


def test_build_takes_the_first_candidate_of_the_document(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    result = tune(TuneConfig(**{**settings, "prefixes": None, "topic": "x"}), ObedientEngine)
    document = result.to_json()
    document["candidates"][0] |= {"prefix": "Hush.", "place": "user", "retain_prefix": False}
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps(document), encoding="utf-8")
    given = ["build", "--teacher", settings["teacher"], "--forget", settings["forget"][0]]
    given += ["--engine", "transformers", "--top-k", "8", "--prefix-from", str(tuned)]

    def recipe(out: str, *more: str) -> dict[str, Any]:
        run = CliRunner().invoke(main, [*given, "--out", str(tmp_path / out), *more])
        assert run.exit_code == 0, run.output
        return json.loads((tmp_path / out / "manifest.json").read_text())["recipe"]

    names = ("prefix", "prefix_place", "retain_prefix")
    assert [recipe("a")[name] for name in names] == ["Hush.", "user", False]
    assert [recipe("b", "--retain-prefix")[name] for name in names] == ["Hush.", "user", True]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"candidates": []}', '{"candidates": [{"prefix": 1}]}']
)
def test_a_file_that_tune_did_not_write_is_refused(text: str, tmp_path: Path) -> None:
    from duet_unlearn.teacher_cache.tune import load_tuned

    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(DataError, match="tuned.json: no candidate with prefix, place"):
        load_tuned(str(tmp_path / "tuned.json"))
    with pytest.raises(DataError, match="no such file"):
        load_tuned(str(tmp_path / "absent.json"))


def test_build_wants_one_source_of_the_prefix(tmp_path: Path) -> None:
    given = ["build", "--teacher", "x", "--forget", "y", "--out", str(tmp_path / "c")]
    for more in ([], ["--prefix", "a", "--prefix-from", "b"]):
        run = CliRunner().invoke(main, [*given, *more])
        assert run.exit_code == 2
        assert "give one of --prefix TEXT|@NAME, --prefix-from FILE and --no-prefix" in run.output
    for more in (["--no-prefix"], ["--prefix-from", "b"]):
        run = CliRunner().invoke(main, [*given, *more, "--topic", "c"])
        assert run.exit_code == 2
        assert "--topic fills {topic} in --prefix" in run.output


def test_the_command_prints_a_table_or_one_document() -> None:
    given = ["tune", "--teacher", str(demo_world.MODEL), "--forget", str(demo_world.FORGET)]
    given += ["--retain", str(demo_world.RETAIN), "--topic", demo_world.TOPIC, "--examples", "0"]
    given += ["--engine", "transformers", "--sample", "4", "--prefix-place", "system"]
    run = CliRunner().invoke(main, [*given, "--json"])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    first = document["candidates"][0]
    assert set(first) == {
        "name",
        "prefix",
        "place",
        "retain_prefix",
        "strength",
        "views",
        "positions",
        "steers",
        "forget_first_token",
        *(f"{s}_{n}" for s in ("forget", "retain") for n in ("queries", "recall", "refused")),
    }
    assert first["steers"]
    assert first["forget_recall"] <= 20
    assert first["retain_recall"] >= 80
    assert first["retain_prefix"] is True
    assert "ordered by: fewest points" in run.stderr


def test_files_of_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("﻿# c\n  one\\ntwo {topic} \n\n", encoding="utf-8")
    [found] = load_prefixes(str(path))
    assert (found.name, found.text) == ("own:2", "one\ntwo {topic}")
    path.write_text("# only this\n")
    with pytest.raises(DataError, match="holds no prefix"):
        load_prefixes(str(path))
    with pytest.raises(DataError, match="no such file of prefixes"):
        load_prefixes(str(tmp_path / "absent.txt"))
