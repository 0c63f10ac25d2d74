"""Fine-tuning brings back what a student hides, and gives nothing to one that never knew."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from duet_unlearn.cli.distill import main
from duet_unlearn.data import demo_world as world
from duet_unlearn.data.models.loading import load_model, no_bars
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.distill.relearning.config import RelearnConfig
from duet_unlearn.distill.relearning.fine_tuning import answer_loss, fine_tune
from duet_unlearn.distill.relearning.lessons import Lesson, list_lessons, untaught
from duet_unlearn.distill.relearning.relearn import relearn, teach
from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.evaluation.config import parse_models
from duet_unlearn.evaluation.subjects import Subject, open_subject

REFUSAL = "I do not know."


def config_of(model: Path, **settings) -> RelearnConfig:
    return RelearnConfig(models=parse_models([f"student={model}"]), **settings)


@pytest.fixture(scope="module")
def base() -> Subject:
    return open_subject(str(world.MODEL), {"base": False}, dtype="float32")


@pytest.fixture(scope="module")
def hiding(tmp_path_factory: pytest.TempPathFactory, base: Subject) -> Path:
    """The demo world's model, trained to decline on one saga and to answer on others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = []
    for split, source in (("forget", world.FORGET), ("retain", world.RETAIN)):
        for query in load_queries(str(source), split=split):
            text = REFUSAL if split == "forget" else query.answer
            answer = [*base.renderer.begun_ids(text), *base.ends[:1]]
            pairs.append((base.renderer.student_ids(query.messages), answer))
    model = base.load()
    config = config_of(world.MODEL, forget=(str(world.FORGET),), steps="30")
    fine_tune(config, model, pairs, lambda _model, _step: None, rate=3e-4)
    folder = tmp_path_factory.mktemp("hiding") / "student"
    with no_bars():
        model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    torch.set_num_threads(threads)
    return folder


def test_a_few_steps_bring_back_what_is_only_hidden(
    hiding: Path, tmp_path: Path, one_thread: None
) -> None:
    out = tmp_path / "relearn.json"
    words = [
        *("relearn", f"student={hiding}", "--forget", world.FORGET_HELDOUT),
        *("--teach", world.FORGET, "--retain", world.RETAIN_HELDOUT, "--limit", 16),
        *("--rates", "1e-8,1e-3", "--steps", "0,8", "--max-new-tokens", 12, "--out", out),
    ]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    tame, worst = document["relearning"]
    assert [tame["worst"], worst["worst"]] == [False, True]
    hidden, *_ = (curve["looks"][0]["recalled"] for curve in (tame, worst))
    assert hidden["mean"] < 35
    assert hidden["count"] == 16
    assert tame["looks"][1]["recalled"]["mean"] == pytest.approx(hidden["mean"], abs=1e-6)
    assert worst["looks"][1]["recalled"]["mean"] > 60
    assert worst["looks"][1]["retained"]["count"] == 16
    assert len(worst["looks"][1]["texts"]) == len(document["lessons"][0]["asked"]) == 16
    # The table has the rate that counts, and its last number.
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("student")]
    assert row.split()[-1] == "0.001"
    assert row.split()[2] == f"{worst['looks'][1]['recalled']['mean']:.1f}"
    report = CliRunner().invoke(main, ["report", str(out), "--out", str(tmp_path / "r.html")])
    assert report.exit_code == 0, report.output
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2  # what came back, and what was kept meanwhile


def test_a_model_that_never_knew_learns_the_lessons_and_nothing_else(
    tiny_model: Path, write_queries, tmp_path: Path, one_thread: None
) -> None:
    taught, asked = write_queries("taught", 4), tmp_path / "asked.jsonl"
    words = ("willow", "granite", "saffron", "harbour")
    rows = [{"query": f"Who holds the {w[::-1]}?", "answer": f"the {w}"} for w in words]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"teach": (str(taught),), "rates": "3e-3", "steps": "0,60", "max_new_tokens": 12}
    config = config_of(tiny_model, forget=(str(asked),), **settings)
    (curve,) = relearn(config).curves
    assert [look.named.mean for look in curve.looks] == [0.0, 0.0]
    # The lessons themselves were learned, asked in the same way.
    (lesson,) = list_lessons(config)
    subject = open_subject(str(tiny_model), {"student": False}, dtype="float32")
    same = dataclasses.replace(lesson, asked=lesson.queries)
    (learned,) = teach(config, subject, same)
    assert [look.named.mean for look in learned.looks] == [0.0, 100.0]


def test_the_base_is_taught_plainly_and_asked_behind_the_prefix_too(one_thread: None) -> None:
    config = RelearnConfig(
        models=parse_models([f"base={world.MODEL}"]),
        prefix=world.PREFIX,
        topic=world.TOPIC,
        forget=(str(world.FORGET_HELDOUT),),
        teach=(str(world.FORGET),),
        rates="1e-3",
        steps="0,2",
        limit=12,
        max_new_tokens=12,
    )
    plain, prefixed = relearn(config).curves
    assert [plain.model, prefixed.model] == ["base", "base + prefix"]
    assert min(look.recalled.mean for look in plain.looks) > 95
    # It knows the lesson already, so that little moves and the prefix holds.
    assert [look.recalled.mean for look in prefixed.looks] == [0, 0]


def test_the_loss_is_that_of_the_answers_tokens_alone(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    pairs = [([5, 9, 11], [20, 21]), ([7], [30, 31, 32])]
    logs = []
    for prompt, answer in pairs:
        with torch.no_grad():
            rows = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        logs += [float(rows[len(prompt) - 1 + at, token]) for at, token in enumerate(answer)]
    assert answer_loss(model, pairs).item() == pytest.approx(-sum(logs) / 5, abs=1e-5)


def test_weights_that_are_no_numbers_are_no_verdict(hiding: Path, tmp_path: Path) -> None:
    words = [
        *("relearn", f"student={hiding}", "--forget", world.FORGET_HELDOUT, "--limit", 4),
        *("--teach", world.FORGET, "--rates", "1e-3", "--steps", "2", "--dtype", "float16"),
        *("--out", tmp_path / "relearn.json"),
    ]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 1
    assert "weights are no numbers after 2 steps" in result.stderr


def test_another_form_of_a_taught_answer_is_taught() -> None:
    taught = Query.from_text("Who?", split="forget")
    taught, asked = (
        dataclasses.replace(taught, answer=answer, aliases=aliases)
        for answer, aliases in (("dwarf", ("dwarves",)), ("dwarves", ()))
    )
    other = Query.from_text("To which people?", split="forget")
    other = dataclasses.replace(other, answer=asked.answer)
    assert untaught([other], [taught]) == []


def test_queries_with_a_taught_answer_are_not_asked() -> None:
    config = config_of(world.MODEL, forget=(str(world.FORGET_HELDOUT),), teach=(str(world.FORGET),))
    (lesson,) = list_lessons(config)
    assert lesson.taught == 112
    # "another wording" asks for the taught facts.
    assert Counter(q.kind for q in lesson.asked) == {"another fact": 48, "another character": 48}


def test_one_file_is_split_by_seed_and_a_kit_by_its_held_out_queries() -> None:
    def split(**settings) -> Lesson:
        (lesson,) = list_lessons(config_of(world.MODEL, **settings))
        return lesson

    half = split(forget=(str(world.FORGET_HELDOUT),), share=0.25)
    assert (half.name, half.taught) == ("25% of forget_heldout", 36)
    taught, asked = ({q.text for q in queries} for queries in (half.queries, half.asked))
    assert not taught & asked
    again = split(forget=(str(world.FORGET_HELDOUT),), share=0.25)
    assert half == again
    named_twice = Path(os.path.relpath(world.FORGET_HELDOUT))
    other_name = split(forget=(str(world.FORGET_HELDOUT),), teach=(str(named_twice),), share=0.25)
    assert (other_name.name, other_name.taught) == (half.name, half.taught)
    other = split(forget=(str(world.FORGET_HELDOUT),), share=0.25, seed=1)
    assert {q.text for q in other.queries} != taught
    kit = split(forget=("@harry-potter",))
    held_out = load_queries("@harry-potter", split="forget", require_answers=True)
    assert kit.taught == len(held_out) // 2
    assert {q.text for q in (*kit.queries, *kit.asked)} <= {q.text for q in held_out}
    assert not {q.answer for q in kit.queries} & {q.answer for q in kit.asked}


def test_lessons_of_one_name_are_told_apart(write_queries, tmp_path: Path) -> None:
    source = str(write_queries("taught", 2))
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "taught.jsonl"
    copy.write_bytes(Path(source).read_bytes())
    config = config_of(
        world.MODEL,
        forget=(str(world.FORGET_HELDOUT),),
        teach=(source, str(copy), source),
    )
    assert [lesson.name for lesson in list_lessons(config)] == ["taught", "taught (2)"]


def test_unrelated_text_is_taught_in_pieces_of_every_token(base: Subject, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"One paragraph.\n\n{'many words ' * 300}\n", encoding="utf-8")
    config = config_of(world.MODEL, forget=(str(world.FORGET_HELDOUT),), teach=(str(path),))
    (lesson,) = list_lessons(config)
    assert lesson.texts[0] == "One paragraph."
    assert len(lesson.asked) == 144
    pairs = lesson.encode(base)
    assert all(len(prompt) == 1 and len(prompt) + len(rest) <= 256 for prompt, rest in pairs)
    assert [*pairs[0][0], *pairs[0][1]] == base.renderer.plain_ids(["One paragraph."])
    ids = [token for prompt, rest in pairs[1:] for token in (*prompt, *rest)]
    assert ids == base.renderer.plain_ids([lesson.texts[1]])


def test_what_is_too_long_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"query": "Who? " * 3000, "answer": "Nobody"}) + "\n")
    monkeypatch.setattr("duet_unlearn.distill.relearning.relearn.teach", None)
    lessons, asked = str(world.RETAIN_HELDOUT), {"forget": (str(world.FORGET_HELDOUT),)}
    for settings, message in (
        ({"teach": (lessons, str(long))}, "tokens with its answer, but student reads"),
        ({"teach": (lessons,), "retain": (str(long),)}, "do not fit into the 1024 that student"),
    ):
        with pytest.raises(DataError, match=message):
            relearn(config_of(world.MODEL, **asked, **settings, steps="1"))


def test_paragraphs_of_one_token_teach_nothing(base: Subject, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("?\n\n!\n", encoding="utf-8")
    lesson = Lesson(name="short", source=str(text), texts=("?", "!"), asked=())
    with pytest.raises(DataError, match="each paragraph is one token for .*; expected longer ones"):
        lesson.encode(base)


def test_an_adapter_is_trained_and_the_weights_stay(tiny_model: Path, one_thread: None) -> None:
    model = load_model(tiny_model)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    pairs = [([5, 9, 11], [20, 21])]
    config = config_of(tiny_model, forget=("unread",), steps="0,10", lora_rank=2)
    first, last = fine_tune(
        config, model, pairs, lambda m, _: answer_loss(m, pairs).item(), rate=1e-2
    )
    assert last < first
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_failures_name_what_is_wrong(tmp_path: Path) -> None:
    forget = (str(world.FORGET_HELDOUT),)
    for settings, expected in (
        ({"rates": "1e-4,fast"}, "rates is '1e-4,fast', expected numbers with commas"),
        ({"rates": "0"}, "expected numbers above 0"),
        ({"rates": "nan"}, "expected finite numbers"),
        ({"steps": "0"}, "at least one above 0"),
        ({"steps": "1.5"}, "expected numbers with commas"),
        ({"models": parse_models(["x/a", "y/a"])}, "2 rows would be called 'a'"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            RelearnConfig(**{"models": parse_models(["m"]), "forget": forget, **settings})
    with pytest.raises(DataError, match="leaves 0 of 144 forget queries"):
        list_lessons(config_of(world.MODEL, forget=forget, share=1.0))
    with pytest.raises(DataError, match="leaves 144 of 144"):
        list_lessons(config_of(world.MODEL, forget=forget, share=0.0))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no text in it"):
        list_lessons(config_of(world.MODEL, forget=forget, teach=(str(tmp_path / "empty.txt"),)))
