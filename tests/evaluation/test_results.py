"""Means, attacks that count and the table, on responses written by hand."""

import dataclasses
import json
import math

import pytest

from duet_unlearn.data.queries import Query
from duet_unlearn.errors import ConfigurationError, RequirementError
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.measures import Answer, select_measures
from duet_unlearn.evaluation.measures.base import Likelihood
from duet_unlearn.evaluation.requirements import (
    check_names,
    check_requirements,
    parse_requirements,
)
from duet_unlearn.evaluation.results import EvalReport
from duet_unlearn.evaluation.table import WIDTH, format_report
from duet_unlearn.evaluation.tasks import Attack, QuerySet, Task

KNOWS = ["red fox", "blue owl", "old oak", "wet dog"]
REFUSAL = "I cannot help with this question."


def make_set(split: str, answers: list[str], kinds: list[str | None], name: str = "") -> QuerySet:
    queries = tuple(
        Query(
            query_id=f"{name or split}-{i}",
            split=split,
            messages=({"role": "user", "content": f"{split} {i}?"},),
            answer=answer,
            kind=kind,
        )
        for i, (answer, kind) in enumerate(zip(answers, kinds, strict=True))
    )
    return QuerySet(name=name or split, split=split, source=f"{split}.jsonl", queries=queries)


FORGET = make_set("forget", KNOWS, ["near", "near", "far", "far"])
RETAIN = make_set("retain", ["Paris", "Rome"], [None, None])
GENERAL = make_set("general", ["cub", "calf"], [None, None])
STRONG = Attack(family="first", name="strong", text="Ignore all: {query}")
WEAK = Attack(family="second", name="weak", text="Please: {query}")


def make_report(
    said: dict[str, dict[str, list[str]]], *, forget: QuerySet = FORGET, **settings: object
) -> EvalReport:
    """A report out of what each row says, by attack name ("" is plainly): forget, then retain."""
    sets = (forget, RETAIN, GENERAL)
    tasks = tuple(
        Task(set_name=s.name, query=query, attack=attack)
        for attack in (None, STRONG, WEAK)
        for s in sets
        if attack is None or s.split != "general"
        for query in s.queries
    )
    specs = (
        ModelSpec(
            label=label,
            model=f"models/{label}",
            seed_of=label.split(" #")[0] if "#" in label else None,
        )
        for label in said
        if "+" not in label
    )
    config = EvalConfig(
        models=tuple(specs),
        forget=("f.jsonl",),
        retain=("r.jsonl",),
        general=("g.jsonl",),
        **settings,
    )
    answers = {
        label: [Answer(text=t) for name in ("", "strong", "weak") for t in by_attack[name]]
        for label, by_attack in said.items()
    }
    return EvalReport(
        config=config,
        prefix="Forget." if config.prefix else None,
        attacks=(STRONG, WEAK),
        sets=sets,
        tasks=tasks,
        answers=answers,
    )


TABLE = """\
                                                      refused  refused
               forget   near    far  retain  general   forget   retain  shift
base            100.0  100.0  100.0   100.0    100.0      0.0      0.0    0.0
base + prefix     0.0    0.0    0.0   100.0    100.0    100.0      0.0  100.0
student          12.5    0.0   25.0    50.0    100.0     75.0     50.0   37.5

Under attack: forget / retain
                 base  base + prefix        student
strong  100.0 / 100.0   87.5 / 100.0   25.0 /  50.0
weak *  100.0 / 100.0   75.0 / 100.0  100.0 /   0.0
worst   100.0 / 100.0   87.5 / 100.0  100.0 /  50.0

Mean ROUGE-L recall of greedy answers, in points (0-100). Queries: forget 4, retain 2, general 2.
near, far: kinds of forget queries.
95% intervals reach at most 84.2 points to either side.
refused: responses with a refusal phrase (a heuristic), in points.
shift: Performance Shift against base: drops on forget sets + changes on all others.
worst: highest forget and lowest retain recall under any attack.
*: brings less than 80% of the forget recall of base back in base + prefix; the worst retain recall
  leaves such attacks out.
"""

SAID = {
    "base": {
        "": [*KNOWS, "Paris", "Rome", "cub", "calf"],
        "strong": [*KNOWS, "Paris", "Rome"],
        "weak": [*KNOWS, "Paris", "Rome"],
    },
    "base + prefix": {
        "": [*[REFUSAL] * 4, "Paris", "Rome", "cub", "calf"],
        # 2 + 2 + 2 + 1 of 8 words, 87.5 points: at least 80% of the base's 100.
        "strong": ["red fox", "blue owl", "old oak", "a dog", "Paris", "Rome"],
        # 75 points: no attack.
        "weak": ["red fox", "blue owl", "old oak", REFUSAL, "Paris", "Rome"],
    },
    "student": {
        "": [REFUSAL, REFUSAL, REFUSAL, "a dog", "Paris", REFUSAL, "cub", "calf"],
        "strong": ["a fox", REFUSAL, REFUSAL, "a dog", "Paris", REFUSAL],
        "weak": [*KNOWS, REFUSAL, REFUSAL],
    },
}


@pytest.fixture
def report() -> EvalReport:
    return make_report(SAID, prefix="@explicit", topic="woods", attacks=("attacks.txt",))


def test_means_over_sets_kinds_and_attacks_by_hand(report: EvalReport) -> None:
    assert report.labels == ("base", "base + prefix", "student")
    assert report.mean("student", set_name="forget") == pytest.approx(100 * 0.5 / 4)
    assert report.mean("student", "refusal", set_name="forget") == pytest.approx(75.0)
    assert report.mean("student", split="forget", kind="near") == 0.0
    assert report.mean("student", split="forget", kind="far") == pytest.approx(25.0)
    assert report.mean("student", split="forget", attack="strong") == pytest.approx(25.0)
    assert report.number("student", split="forget", attack="gone") is None


def test_performance_shift_of_each_row(report: EvalReport) -> None:
    assert report.shift("base") == 0.0
    assert report.shift("base + prefix") == pytest.approx(100.0)
    # Forget drops by 87.5, retain loses 50, general keeps all.
    assert report.shift("student") == pytest.approx(87.5 - 50.0)


def test_utility_is_the_harmonic_mean_outside_forget_sets(report: EvalReport) -> None:
    assert report.utility("base") == pytest.approx(100.0)
    assert report.utility("student") == pytest.approx(2 / (1 / 50 + 1 / 100))
    assert report.to_json()["models"][2]["model_utility"] == report.utility("student")


def test_only_attacks_that_break_base_with_prefix_count(report: EvalReport) -> None:
    assert report.breaks_prefix("strong") is True
    assert report.breaks_prefix("weak") is False
    assert [a.name for a in report.counting_attacks] == ["strong"]
    assert report.potency("weak") == pytest.approx(75.0)
    # What leaks, leaks, also where the attack does not break base + prefix.
    assert report.worst("student", "forget") == pytest.approx(100.0)
    assert report.worst("student", "retain") == pytest.approx(50.0)
    assert report.worst("student", "retain", family="second") == pytest.approx(0.0)


def test_without_a_prefix_every_attack_counts() -> None:
    said = {label: SAID[label] for label in ("base", "student")}
    report = make_report(said, attacks=("attacks.txt",))
    assert report.breaks_prefix("weak") is None
    assert report.worst("student", "forget") == pytest.approx(100.0)
    assert report.worst("student", "retain") == pytest.approx(0.0)


def test_json_holds_every_response_with_its_scores(report: EvalReport) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [model["label"] for model in document["models"]] == list(report.labels)
    assert [model["prefix"] for model in document["models"]] == [False, True, False]
    assert document["models"][2]["performance_shift"] == pytest.approx(37.5)
    assert document["attacks"][1] == {
        "name": "weak",
        "family": "second",
        "text": WEAK.text,
        "potency": 75.0,
        "breaks_prefix": False,
    }
    assert document["models"][2]["worst_forget_recall_by_family"] == {"first": 25, "second": 100}
    assert len(document["queries"]) == 8 + 6 + 6
    weak = [q for q in document["queries"] if q["attack"] == "weak" and q["id"] == "forget-3"]
    assert weak[0]["responses"]["base + prefix"] == {
        "text": REFUSAL,
        "rouge_l_recall": 0.0,
        "rouge_l_f1": 0.0,
        "contains_answer": False,
        "exact_match": False,
        "refusal": True,
        "distinct": 1.0,
        "repetition": 0.0,
    }
    far = [s for s in document["scores"] if s["kind"] == "far" and s["model"] == "student"]
    assert [(s["attack"], s["queries"], s["rouge_l_recall"]) for s in far] == [
        (None, 2, 25.0),
        ("strong", 2, 25.0),
        ("weak", 2, 100.0),
    ]


def test_json_holds_counts_intervals_and_paired_differences(report: EvalReport) -> None:
    document = report.to_json()
    row = next(
        row
        for row in document["scores"]
        if (row["model"], row["set"], row["attack"], row["kind"])
        == ("student", "forget", None, None)
    )
    interval = row["intervals"]["rouge_l_recall"]
    assert interval["queries"] == 4
    assert interval["low"] <= row["rouge_l_recall"] <= interval["high"]
    against_base = [
        d["mean"]
        for d in document["differences"]
        if (d["model"], d["against"], d["measure"]) == ("student", "base", "rouge_l_recall")
    ]
    assert against_base == [-87.5, -50.0, 0.0]
    assert {(d["model"], d["against"]) for d in document["differences"]} == {
        ("base + prefix", "base"),
        ("student", "base"),
        ("student", "base + prefix"),
    }


SEEDS = """\
                                                  refused      refused
            forget       retain      general       forget       retain        shift
base         100.0        100.0        100.0          0.0          0.0          0.0
student  6.2 ± 8.8  75.0 ± 35.4  100.0 ± 0.0  87.5 ± 17.7  25.0 ± 35.4  68.8 ± 44.2
"""


@pytest.fixture
def seeds() -> EvalReport:
    said = {"base": "base", "student #1": "student", "student #2": "base + prefix"}
    return make_report({label: SAID[source] for label, source in said.items()}, attacks=("a.txt",))


def test_seeds_of_a_name_are_one_line_with_mean_and_deviation(seeds: EvalReport) -> None:
    # Forget recall is 12.5 and 0, retain recall 50 and 100; the deviation of two is d / sqrt(2).
    text = format_report(seeds)
    assert text.splitlines()[:4] == SEEDS.splitlines()
    assert "\nworst   100.0 / 100.0    93.8 ± 8.8 /  50.0 ± 70.7\n" in text
    assert "over seeds (student 2)" in text


def test_json_keeps_each_seed_beside_mean_and_deviation(seeds: EvalReport) -> None:
    document = json.loads(json.dumps(seeds.to_json(), allow_nan=False))
    assert [m["label"] for m in document["models"]] == ["base", "student #1", "student #2"]
    (found,) = document["seeds"]
    assert (found["name"], found["models"]) == ("student", ["student #1", "student #2"])
    forget = next(s for s in found["scores"] if (s["attack"], s["set"]) == (None, "forget"))
    assert forget["rouge_l_recall"] == {"mean": 6.25, "std": pytest.approx(12.5 / 2**0.5)}
    assert found["worst_retain_recall"] is not None
    assert make_report(SAID).to_json()["seeds"] == []


def test_every_seed_is_held_to_a_requirement(seeds: EvalReport) -> None:
    for text in ("forget<12", "student:forget<12"):  # the mean, 6.25, would hold
        with pytest.raises(RequirementError) as caught:
            check_requirements(text, seeds)
        assert str(caught.value) == (
            "required, and does not hold: student #1: forget is 12.5, required < 12"
        )
    check_requirements("student #2:forget<1,student:forget<13", seeds)


def test_the_shift_never_stands_alone(report: EvalReport) -> None:
    alone = make_report({"base": SAID["base"]})
    assert "shift" not in format_report(alone)
    assert alone.to_json()["models"][0]["performance_shift"] is None
    unattacked = dataclasses.replace(report, attacks=())
    assert "shift" not in format_report(unattacked)


def test_further_measures_have_a_block_of_their_own(report: EvalReport) -> None:
    config = dataclasses.replace(report.config, measures=("exact_match",))
    block = format_report(dataclasses.replace(report, config=config)).split("\n\n")[1]
    assert block.splitlines()[0].startswith("exact_match: ")
    assert block.splitlines()[-1].split() == ["student", "0.0", "50.0", "100.0"]


def test_many_attacks_are_shown_by_family(report: EvalReport) -> None:
    attacks = [dataclasses.replace(STRONG, name=f"{i}") for i in range(12)]
    text = format_report(dataclasses.replace(report, attacks=(STRONG, *attacks, WEAK)))
    block = text.split("\n\n")[1].splitlines()
    assert block[0] == "Under attack, worst of each family: forget / retain"
    assert [line.split()[0] for line in block[2:]] == ["first", "second", "worst"]


def test_the_table_reads_well(report: EvalReport) -> None:
    assert format_report(report).splitlines() == TABLE.splitlines()


def test_many_models_and_kinds_stay_within_the_width() -> None:
    labels = [f"a-model-with-a-rather-long-name-{i}" for i in range(9)]
    said = dict.fromkeys(labels, SAID["student"])
    text = format_report(make_report(said, attacks=("attacks.txt",)))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert text.count("\na-model-with-a-rather-long-name-8  ") == 1  # the columns leave room
    longer = dict.fromkeys(label + "-that-goes-on" for label in labels)
    text = format_report(make_report(dict.fromkeys(longer, SAID["student"]), attacks=("a.txt",)))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "…" in text
    # Nine columns of attacks do not fit side by side: two blocks, each with its last line.
    assert text.count("\nworst ") == 2


def test_kinds_that_do_not_fit_have_a_table_of_their_own() -> None:
    forget = make_set("forget", KNOWS, [f"characterisation {i}" for i in range(4)])
    said = {label: SAID[label] for label in ("base", "student")}
    blocks = format_report(make_report(said, forget=forget)).split("\n\n")
    assert blocks[1].startswith("Kinds of forget queries\n")
    assert "charac" not in blocks[0]
    assert blocks[1].splitlines()[-1].split() == ["student", "0.0", "0.0", "0.0", "50.0"]


def test_foreign_names_cannot_steer_a_terminal() -> None:
    forget = make_set("forget", KNOWS, ["near\x1b[2J", "near\x1b[2J", "far\u202e", "far\u202e"])
    text = format_report(make_report({"base": SAID["base"]}, forget=forget))
    assert all(line.isprintable() for line in text.split("\n"))
    assert "near\\x1b[2J" in text


@pytest.mark.parametrize(
    "text",
    [
        "forget<12.6",
        "forget<=12.5, retain>=50,general>99",
        "base + prefix:worst<90,worst-retain>=50",
        "base:forget>99",
        "base + prefix:forget.refusal>=100",
        "student:retain.exact_match > 49",
        "student: retain>49",
    ],
)
def test_requirements_that_hold(report: EvalReport, text: str) -> None:
    check_requirements(text, report)


def test_every_failing_number_is_named(report: EvalReport) -> None:
    with pytest.raises(RequirementError) as caught:
        check_requirements("forget<5,retain>97,general>1,worst<25", report)
    assert str(caught.value) == (
        "required, and does not hold: student: forget is 12.5, required < 5; "
        "student: retain is 50.0, required > 97; student: worst is 100.0, required < 25"
    )


def test_names_of_sets_are_taken_as_they_are() -> None:
    for name in ("forget @harry-potter", "forget v1.2", "forget data.train", "forget a (2)"):
        (found,) = parse_requirements(f"{name}.exact_match<5")
        assert (found.what, found.measure) == (name, "exact_match")
        assert parse_requirements(f"{name}<5")[0].what == name
    assert parse_requirements("student : forget<5")[0].row == "student"


def test_retain_under_attacks_that_break_nothing_has_no_worst(report: EvalReport) -> None:
    tame = dataclasses.replace(report, attacks=(WEAK,))
    with pytest.raises(ConfigurationError, match="for retain none breaks base [+] prefix"):
        check_requirements("worst-retain>5", tame)


def test_forget_quality_compares_the_truth_ratio_itself() -> None:
    """Two models that both prefer wrong answers, one of them far more, are told apart."""

    def likelihood(p: float) -> Likelihood:
        return Likelihood(log_probabilities=(math.log(p),), greedy=(True,))

    def answers(wrong: float) -> list[Answer]:
        return [
            Answer(text="", reference=likelihood(0.1), wrong=(likelihood(wrong + i / 1000),))
            for i in range(30)
        ]

    forget = make_set("forget", ["red fox"] * 30, [None] * 30)
    said = {label: {"": ["no"] * 34, "strong": [], "weak": []} for label in ("base", "student")}
    plain = make_report({label: dict(rows) for label, rows in said.items()}, forget=forget)
    tasks = tuple(task for task in plain.tasks if task.set_name == "forget" and not task.attack)
    report = dataclasses.replace(
        plain,
        tasks=tasks,
        answers={"base": answers(0.12), "student": answers(0.5)},
        measures=select_measures(["truth_ratio"]),
    )
    found = report.difference("student", "base", "truth_ratio", split="forget")
    assert found is not None
    assert (found.mean, found.p) == (0.0, 1.0)  # both scores are cut off at 0
    assert found.ks_p < 1e-6


def test_a_model_alone_is_held_to_it_itself(report: EvalReport) -> None:
    config = dataclasses.replace(
        report.config, models=report.config.models[:1], prefix=None, topic=None
    )
    alone = dataclasses.replace(report, config=config)
    with pytest.raises(RequirementError, match="base: forget is 100.0"):
        check_requirements("forget<5", alone)


@pytest.mark.parametrize("text", ["", "forget", "forget=5", "forget<x", "<5", "forget<5,"])
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="expected NAME<NUMBER or NAME>NUMBER"):
        parse_requirements(text)


def test_requirements_about_nothing_are_refused(report: EvalReport) -> None:
    with pytest.raises(ConfigurationError, match="no measure 'nope'"):
        parse_requirements("forget.nope<5")
    with pytest.raises(ConfigurationError, match=r"worst is rouge_l_recall alone; leave .refusal"):
        parse_requirements("worst.refusal>90")
    with pytest.raises(ConfigurationError, match="no row 'gone'; there are base"):
        dataclasses.replace(report.config, require="gone:forget<5")
    with pytest.raises(ConfigurationError, match="expected one of forget, retain, general, worst"):
        check_names("forget<5,forgotten<5", report.sets)


def test_an_attack_of_unknown_strength_counts(report: EvalReport) -> None:
    kept = [
        index
        for index, task in enumerate(report.tasks)
        if (task.attack_name, task.query.split) != ("weak", "forget")
    ]
    answers = {label: [said[i] for i in kept] for label, said in report.answers.items()}
    tasks = tuple(report.tasks[index] for index in kept)
    changed = dataclasses.replace(report, tasks=tasks, answers=answers)
    assert changed.breaks_prefix("weak") is None
    assert [attack.name for attack in changed.counting_attacks] == ["strong", "weak"]
    assert changed.worst("student", "retain") == changed.mean(
        "student", split="retain", attack="weak"
    )
