"""A build measures its teacher first: what a good one and a bad one look like, and what is kept."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from duet_unlearn.data import demo_world
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.errors import DuetError
from duet_unlearn.teacher_cache.build import check
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.check import SAMPLE, check_teacher
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.engines.base import EngineConfig
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine
from duet_unlearn.teacher_cache.inspect import render_summary, summarize
from duet_unlearn.teacher_cache.steering import Steering

PREFIX = resolve_prefix(demo_world.PREFIX, demo_world.TOPIC)
PERFECT = {
    "forget_queries": 16,
    "forget_recall": 0.0,
    "forget_refused": 100.0,
    "retain_queries": 16,
    "retain_recall": 100.0,
    "retain_refused": 0.0,
}


class Recorder(TransformersEngine):
    """The real engine, keeping the settings it was started with and what it answered."""

    configs: ClassVar[list[EngineConfig]] = []
    answers: ClassVar[list[list[int]]] = []

    def __init__(self, config: EngineConfig) -> None:
        Recorder.configs.append(config)
        super().__init__(config)

    def responses(self, prompts: Any, max_new_tokens: int) -> Any:
        for index, ids in super().responses(prompts, max_new_tokens):
            Recorder.answers.append(ids)
            yield index, ids


@pytest.fixture(autouse=True)
def _forget_recorded(caplog: pytest.LogCaptureFixture) -> None:
    Recorder.configs, Recorder.answers = [], []
    logging.getLogger("duet_unlearn").propagate = True


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    sources = {}
    for split, path in (("forget", demo_world.FORGET), ("retain", demo_world.RETAIN)):
        some = tmp_path / f"{split}.jsonl"
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        some.write_text("".join(lines[:16]), encoding="utf-8")
        sources[split] = (str(some),)
    return BuildConfig(
        teacher=str(demo_world.MODEL),
        prefix=PREFIX,
        out=tmp_path / "cache",
        engine="transformers",
        top_k=5,
        **sources,
    )


def test_a_good_teacher_passes_and_its_numbers_are_shown(
    config: BuildConfig, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = build(config, Recorder).manifest
    assert manifest.check == PERFECT
    assert "this teacher" not in caplog.text
    assert len(Recorder.answers) == 2 * 32
    text = render_summary(summarize(config.out))
    assert "the teacher on a sample of the queries" in text
    assert "forget_recall" in text
    card = (config.out / "README.md").read_text(encoding="utf-8")
    assert "| retain_recall | 100.0 |" in card
    assert build(config, Recorder).hit
    assert build(replace(config, check=False), Recorder).hit, "a check is no part of the recipe"
    assert len(Recorder.configs) == 1


def test_a_bad_teacher_is_named_with_an_example_and_what_to_try(
    config: BuildConfig, caplog: pytest.LogCaptureFixture
) -> None:
    # What should be kept is what the prefix forgets, and the other way round.
    manifest = build(replace(config, forget=config.retain, retain=config.forget)).manifest
    assert manifest.check is not None
    assert (manifest.check["forget_recall"], manifest.check["retain_recall"]) == (100.0, 0.0)
    forget, retain = [line for line in caplog.messages if "this teacher" in line]
    assert "does not forget: behind the prefix 100% of the base's answers to 16" in forget
    assert "duet-cache tune" in forget
    assert "does not keep: behind the prefix 0% of the base's answers to 16" in retain
    assert "--no-retain-prefix" in retain
    assert "gives 'I" in retain


def test_retain_queries_without_a_prefix_are_the_bases_own_and_not_asked(
    config: BuildConfig, caplog: pytest.LogCaptureFixture
) -> None:
    swapped = {"forget": config.retain, "retain": config.forget, "retain_prefix": False}
    manifest = build(replace(config, **swapped), Recorder).manifest
    assert manifest.check == {
        "forget_queries": 16,
        "forget_recall": 100.0,
        "forget_refused": 0.0,
    }
    assert len(Recorder.answers) == 2 * 16
    assert "does not keep" not in caplog.text


def test_no_check_asks_nothing(config: BuildConfig, tmp_path: Path) -> None:
    manifest = build(replace(config, check=False), Recorder).manifest
    assert manifest.check is None
    assert Recorder.answers == []
    assert Recorder.configs[0].max_new_tokens == 0
    # Where no engine starts there is nothing to measure either.
    again = replace(config, out=tmp_path / "again", reuse=(str(config.out),))
    assert build(again, Recorder).manifest.check is None
    assert len(Recorder.configs) == 1


def test_the_answers_are_not_in_the_cache(config: BuildConfig) -> None:
    build(config, Recorder)
    tokenizer = load_tokenizer(demo_world.MODEL)
    said = {tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in Recorder.answers}
    longest = max((text for text in said if not text.startswith("I ")), key=len)
    assert len(longest.split()) > 1
    for path in config.out.rglob("*"):
        if path.is_file():
            assert longest.encode() not in path.read_bytes()


def test_answers_end_where_the_context_does(
    tiny_model: Path, write_queries: Any, tmp_path: Path
) -> None:
    config = BuildConfig(
        teacher=str(tiny_model),
        forget=(str(write_queries("forget", 3)),),
        prefix="Forget " * 10,
        out=tmp_path / "cache",
        top_k=5,
    )
    build(replace(config, out=tmp_path / "other"), Recorder)
    longest = Recorder.configs[0].max_prompt_tokens
    prefix = config.prefix + "x" * (256 - longest - 10)
    build(replace(config, prefix=prefix), Recorder)
    assert 1 <= Recorder.configs[1].max_new_tokens < 24
    assert Recorder.configs[1].max_prompt_tokens + Recorder.configs[1].max_new_tokens == 256


def test_the_sample_is_seeded_and_of_both_splits(tiny_model: Path, write_queries: Any) -> None:
    files = {"forget": write_queries("forget", 50), "retain": write_queries("retain", 60, "river")}
    queries = [q for split, path in files.items() for q in load_queries(str(path), split=split)]
    tokenizer = load_tokenizer(tiny_model)

    class Deaf:
        asked: ClassVar[list[tuple[int, ...]]] = []

        def responses(self, prompts: Any, max_new_tokens: int) -> Any:
            Deaf.asked += [tuple(ids) for _, ids in prompts]
            return [(index, []) for index, _ in prompts]

    def ask(given: Any) -> list[tuple[int, ...]]:
        Deaf.asked = []
        renderer = PromptRenderer(tokenizer, prefix="Forget.", place="system")
        check = check_teacher(
            Deaf(),  # type: ignore[arg-type]
            given,
            renderer,
            tokenizer,
            retain_prefix=True,
            max_new_tokens=4,
        )
        assert check == {}, "a base that says nothing tells nothing"
        return Deaf.asked

    first = ask(queries)
    assert len(first) == 2 * 2 * SAMPLE
    assert first == ask(list(reversed(queries)))


def test_an_engine_that_fails_in_the_check_is_one_line(config: BuildConfig) -> None:
    class Broken(TransformersEngine):
        def responses(self, prompts: Any, max_new_tokens: int) -> Any:
            raise DuetError("transformers engine: cannot run; try less")

    with pytest.raises(DuetError, match="cannot run; try less"):
        build(config, Broken)
    assert not (config.out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("forget", "retain", "said"), [(20, 80, []), (20.1, 80, ["forget"]), (20, 79.9, ["keep"])]
)
def test_a_teacher_is_called_bad_from_a_fifth_on(
    forget: float, retain: float, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = [(Query.from_text("Who?", split="forget"), "the old miller", "nobody")]
    scores = {
        split: Steering(queries=1, recall=recall, refused=0.0)
        for split, recall in (("forget", forget), ("retain", retain))
    }
    check._warn(scores, dict.fromkeys(scores, asked))
    assert [m.split("does not ")[1].split(":")[0] for m in caplog.messages] == said
