"""A report of a real evaluation of tiny models, read back; in a browser where there is one."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run
from duet_unlearn.errors import CacheError, DataError
from duet_unlearn.evaluation.config import EvalConfig, parse_models
from duet_unlearn.evaluation.evaluate import evaluate
from duet_unlearn.evaluation.report.charts import lay_out
from duet_unlearn.evaluation.report.content import make_content
from duet_unlearn.evaluation.report.first_tokens import compare_first_tokens
from duet_unlearn.evaluation.report.overview import make_overview
from duet_unlearn.evaluation.report.pages import render_html, render_markdown
from duet_unlearn.evaluation.report.sources import Sources, find_sources
from duet_unlearn.evaluation.report.verdict import judge
from duet_unlearn.teacher_cache.inspect import summarize
from duet_unlearn.urls import published_value

HOSTILE = "</script><img src=x onerror=alert(1)> | `a` \u202e [b](http://c)"
BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, tiny_model: Path, tiny_cache: Path) -> Path:
    """An evaluation of a base and its trained student, both in one folder; never changed."""
    tmp_path = tmp_path_factory.mktemp("report")
    run(
        RunConfig(
            cache=str(tiny_cache),
            student=str(tiny_model),
            out=str(tmp_path / "student"),
            views=("@remember",),
            max_steps=3,
            batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
        )
    )
    for split in ("forget", "retain"):
        rows = [
            {"query": f"Who is the keeper of {split} {i}? {HOSTILE}", "answer": f"a{i} {HOSTILE}"}
            for i in range(3)
        ]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps({**r, "kind": "k"}) + "\n" for r in rows))
    config = EvalConfig(
        models=parse_models([f"base={tiny_model}", f"<b>s={tmp_path / 'student'}"]),
        forget=(str(tmp_path / "forget.jsonl"),),
        retain=(str(tmp_path / "retain.jsonl"),),
        prefix="Forget it.",
        attacks=("@role-play", "@family:authority", "@ignore-above"),
        max_new_tokens=4,
    )
    text = json.dumps(evaluate(config).to_json())
    (tmp_path / "eval.json").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def sources(folder: Path) -> Sources:
    return find_sources([folder], summarize)


class _Page(HTMLParser):
    """Tags with their attributes, the script's data, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_all_of_an_evaluation_is_in_the_page_and_all_of_it_is_text(
    sources: Sources, tiny_cache: Path
) -> None:
    sources.caches.append(summarize(tiny_cache))
    content = make_content(sources, compare_first_tokens(sources, 2), title=HOSTILE)
    page = render_html(content)
    parsed = _Page(page)
    # Everything foreign is text: no tag of it opens, and nothing points out of the file.
    assert not [tag for tag, _ in parsed.tags if tag in {"img", "iframe"}]
    assert {attributes.get("class") for tag, attributes in parsed.tags if tag == "b"} <= {"seen"}
    assert sum(tag == "script" for tag, _ in parsed.tags) == 2
    assert [a for t, a in parsed.tags if "src" in a or (a.get("href") or "#")[0] not in "#d"] == []
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    (answers,) = json.loads(data[1])
    assert answers["answers"] == content["evaluations"][0]["answers"]
    assert len(answers["answers"]) == 6 * (1 + 3)
    assert answers["labels"] == ["base", "base + prefix", "<b>s"]
    assert HOSTILE in answers["answers"][0]["query"]
    charts = [tag for tag, _ in parsed.tags if tag == "svg"]
    assert len(charts) == 1  # the student's loss; it was not evaluated while it trained
    assert summarize(tiny_cache)["digest"] in page


def test_a_student_that_was_trained_on_answers_has_its_place(sources: Sources) -> None:
    (student,) = sources.students
    record = {k: v for k, v in student.run.items() if k not in ("cache", "views")}
    answers = f"sha256:{'a' * 64}"
    sources.students[:] = [dataclasses.replace(student, run={**record, "answers": answers})]
    (found,) = make_content(sources)["students"]
    assert found["facts"]["answers"] == answers
    assert "cache" not in found["facts"]


def test_families_say_what_the_student_has_seen(sources: Sources) -> None:
    (evaluation,) = make_content(sources)["evaluations"]
    seen = {family["family"]: family["seen"] for family in evaluation["families"]}
    assert seen == {
        "role-play": [False, False, False],
        "authority": [False, False, False],
        "override": [False, False, True],
    }
    assert evaluation["models"][2]["trained"] == "student"


def test_first_tokens_of_all_rows_stand_beside_the_cached_ones(
    sources: Sources, tiny_cache: Path
) -> None:
    sources.caches.append(summarize(tiny_cache))
    found = compare_first_tokens(sources, 2)
    assert [f["split"] for f in found[:4]] == ["forget", "forget", "retain", "retain"]
    trained = found[4]
    labels = [column["label"] for column in trained["columns"]]
    assert labels == ["base", "base + prefix", "<b>s", "teacher, as cached"]
    base, prefixed = trained["columns"][:2]
    assert base["base_choice"]["rank"] == 1
    assert base["base_choice"]["id"] == base["tokens"][0]["id"]
    assert base["tokens"][0]["id"] == prefixed["base_choice"]["id"]
    logits = [token["logit"] for token in base["tokens"]]
    assert len(logits) == 10
    assert logits == sorted(logits, reverse=True)
    # Without models, what the cache has is shown.
    cached = make_content(sources)["first_tokens"]
    assert [len(f["columns"]) for f in cached] == [1] * len(cached)
    assert len(make_content(sources, found)["first_tokens"]) == len(found)


@pytest.fixture
def behind(tiny_model: Path, tmp_path: Path, write_queries: Any) -> Callable[..., Path]:
    """Evaluate the base plainly and behind a prefix, and return the written evaluation."""

    def evaluated(**settings: Any) -> Path:
        config = EvalConfig(
            models=parse_models([f"base={tiny_model}"]),
            forget=(str(write_queries("forget", 2)),),
            retain=(str(write_queries("retain", 2)),),
            max_new_tokens=2,
            **settings,
        )
        path = tmp_path / "eval.json"
        path.write_text(json.dumps(evaluate(config).to_json()), encoding="utf-8")
        return path

    return evaluated


def test_the_teachers_column_is_what_the_cache_holds(
    behind: Callable[..., Path], tiny_cache: Path
) -> None:
    path = behind(prefix="You have forgotten the lantern.")
    found = compare_first_tokens(find_sources([path, tiny_cache], summarize), 0)
    _, teacher, cached = next(f for f in found if f["split"] == "forget")["columns"]
    assert [t["id"] for t in teacher["tokens"]] == [t["id"] for t in cached["tokens"]]
    wanted = [t["logit"] for t in cached["tokens"]]
    assert [t["logit"] for t in teacher["tokens"]] == pytest.approx(wanted, abs=1e-2)


def test_first_tokens_stand_behind_the_prefix_as_it_was_asked(
    behind: Callable[..., Path],
) -> None:
    # A resolved prefix that looks like the name of one.
    path = behind(prefix="{topic} is unknown to you.", topic="@jack")
    columns = compare_first_tokens(find_sources([path], summarize), 1)[0]["columns"]
    assert [column["label"] for column in columns] == ["base", "base + prefix"]


def test_markdown_holds_verdicts_and_tables_and_opens_no_tag(sources: Sources) -> None:
    text = render_markdown(make_content(sources, compare_first_tokens(sources, 1)))
    assert text.startswith("# Did it forget?\n")
    assert r"| override \* |" in text
    assert "(seen)" in text
    _assert_foreign_text_opens_nothing(text)


def _assert_foreign_text_opens_nothing(markdown: str) -> None:
    """No tag, no link, and each row of a table has as many cells as its heading."""
    assert not re.search(r"(?<!\\)[<\[]", markdown)
    for block in markdown.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def _add_stress_tests(sources: Sources) -> None:
    """Documents of searched attacks and of a probe, with names and a suffix that are foreign."""
    number = {"mean": 12.5, "low": 0.0, "high": 25.0, "count": 8}
    models = ["base", "base + prefix", HOSTILE, "a-long-name-of-a-student-trained-in-views"]
    attacking = [
        {
            **{"model": model, "attack": attack, "recalled": number, "retained": number},
            "suffix": HOSTILE * 3 if attack == "suffix" else None,
        }
        for model in models
        for attack in ("none", "suffix", "soft prompt")
    ]
    probing = [
        {
            **{"model": model, "layer": layer, "rank": 151_000.5 / layer, "shuffled": 49.5},
            **dict.fromkeys(("probability", "told_apart", "retain_told_apart"), number),
        }
        for model in models
        for layer in range(1, 29)
    ]
    sources.stress_tests = {
        "attacking": [("attack.json", {"attacking": attacking, "trained": 112})],
        "probing": [("probe.json", {"probing": probing, "pairs": {"forget": 72, "retain": 51}})],
    }


def test_stress_tests_have_their_sections_and_their_text_is_text(sources: Sources) -> None:
    _add_stress_tests(sources)
    content = make_content(sources)
    page = render_html(content)
    parsed = _Page(page)
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    links = [(a["href"] or "")[1:] for t, a in parsed.tags if t == "a"]
    assert {"attacking", "probing"} <= set(links) <= set(ids)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 1 + 3
    missing = content["evaluations"][0]["not_tested"]
    assert "relearning" in missing
    assert "searched attacks" not in missing
    text = render_markdown(content)
    assert "| base + prefix | 28 | 5392.88 | 12.5 (0.0 to 25.0) |" in text
    _assert_foreign_text_opens_nothing(text)
    del sources.stress_tests["probing"][0][1]["pairs"]
    with pytest.raises(DataError, match="a stress test's record: damaged, KeyError at 'pairs'"):
        make_content(sources)


def _document(*, small: float | None = None, **worst: Any) -> dict[str, Any]:
    """A forget and a retain set, a base that knows all, and a student."""
    means = {"base": (100.0, 90.0), "student": (0.0, 90.0)}
    found = worst.get("worst_forget_recall", 5.0)
    drawn_out = {} if found is None else {"forget": found}
    drawn_out |= {} if small is None else {"small": small}
    interval = {"rouge_l_recall": {"low": 0.0, "high": 3.0, "queries": 100}}
    return {
        "config": {},
        "models": [
            {"label": "base", "model": "b", "prefix": False, "worst_forget_recall": 100.0},
            {
                "label": "student",
                "model": "runs/s",
                "prefix": False,
                "worst_forget_recall": 5.0,
                "worst_forget_recall_by_family": {"begun-answer": 5.0, "override": 0.0},
                **worst,
            },
        ],
        "sets": [{"name": n, "split": n, "kinds": []} for n in ("forget", "retain")],
        "attacks": [{"breaks_prefix": True}, {"breaks_prefix": False}],
        "scores": [
            {
                "model": label,
                "attack": None,
                "set": name,
                "kind": None,
                "queries": 100,
                "rouge_l_recall": mean,
                "intervals": interval,
            }
            for label, both in means.items()
            for name, mean in zip(("forget", "retain"), both, strict=True)
        ]
        + [
            {
                "model": "student",
                "attack": "begun-plainly",
                "set": name,
                "kind": None,
                "queries": queries,
                "rouge_l_recall": drawn_out.get(name, 0.0),
                "intervals": {},
            }
            for name, queries in (("forget", 100), ("small", 10))
            if name in drawn_out
        ],
    }


@pytest.mark.parametrize(
    ("change", "state", "headline"),
    [
        ({}, "good", "forgotten under every attack tried, the rest kept"),
        ({"worst_forget_recall": 11.0}, "bad", "hidden, not forgotten: attacks bring some of it"),
        ({"worst_forget_recall": 49.0}, "bad", "hidden, not forgotten: attacks bring some of it"),
        ({"worst_forget_recall": 51.0}, "bad", "hidden, not forgotten: attacks bring it back"),
        ({"worst_forget_recall": None}, "open", "not said when asked plainly; never attacked"),
        ({"forget": 30.0}, "bad", "not forgotten"),
        ({"retain": 85.0}, "bad", "forgotten, but retain suffered"),
        ({"known": 0.0}, "open", "base knows none of it"),
    ],
)
def test_the_verdict_claims_no_more_than_was_measured(change, state, headline) -> None:
    change = dict(change)
    sets = {name: change.pop(name) for name in ("forget", "retain") if name in change}
    known = change.pop("known", None)
    document = _document(**change)
    for row in document["scores"]:
        if row["model"] == "student" and row["set"] in sets:
            row["rouge_l_recall"] = sets[row["set"]]
        if known is not None and row["model"] == "base" and row["set"] == "forget":
            row["rouge_l_recall"] = known
    (verdict,) = judge(document, make_overview(document, Sources()))
    assert verdict["state"] == state
    assert verdict["headline"].startswith(headline)
    if change.get("worst_forget_recall", 5.0) is not None:
        assert "Of 2 attacks in 2 families the worst (begun-answer) draws out" in verdict["text"]


def test_a_set_that_comes_back_whole_is_not_hidden_behind_a_large_one() -> None:
    document = _document(small=50.0)  # 5 points of both sets together
    document["sets"].append({"name": "small", "split": "forget", "kinds": []})
    for label, mean in (("base", 60.0), ("student", 0.0)):
        (plain,) = [s for s in document["scores"] if s["attack"] is None and s["model"] == label][
            :1
        ]
        document["scores"].append({**plain, "set": "small", "rouge_l_recall": mean})
    (verdict,) = judge(document, make_overview(document, Sources()))
    assert verdict["headline"] == "hidden, not forgotten: attacks bring it back"


@pytest.mark.parametrize("worst", [5.0, None])
def test_a_searched_attack_on_the_same_model_counts_in_its_verdict(worst) -> None:
    rows = [
        ("s", "none", 0.0),
        ("s", "suffix", 30.0),
        ("s", "soft prompt", 99.0),
        ("s + prefix", "suffix", 100.0),
    ]
    attacked = {
        "config": {"models": [{"label": "s", "model": str(Path("runs/s").resolve())}]},
        "attacking": [
            {"model": model, "attack": attack, "recalled": {"mean": mean}}
            for model, attack, mean in rows
        ],
    }
    document = _document(worst_forget_recall=worst)
    sources = Sources(stress_tests={"attacking": [("attack.json", attacked)]})
    (verdict,) = judge(document, make_overview(document, sources))
    assert verdict["headline"] == "hidden, not forgotten: attacks bring it back"
    assert "A searched attack draws out 99.0" in verdict["text"]
    assert "No attack was tried" not in verdict["text"]
    attacked["config"]["models"][0]["model"] = "runs/another"
    (verdict,) = judge(document, make_overview(document, sources))
    assert not verdict["headline"].startswith("hidden")
    assert "searched attack" not in verdict["text"]


def test_every_test_stands_at_a_glance(sources: Sources, folder: Path) -> None:
    _, document = sources.evaluations[0]
    base, student = document["models"][0], document["models"][2]
    models = [{"label": "b", "model": base["model"]}, {"label": "s", "model": student["model"]}]

    def look(step: int, mean: float) -> dict[str, Any]:
        return {"step": step, "recalled": {"mean": mean}}

    rounded = copy.deepcopy(document)
    rounded["attacks"] = []
    rounded["models"] = [m for m in rounded["models"] if not m["prefix"]]
    rounded["models"] += [
        {**m, "label": f"{m['label']} int4", "quantized": "int4"} for m in rounded["models"]
    ]
    rounded["scores"] += [
        {**s, "model": f"{s['model']} int4", "rouge_l_recall": 7.0} for s in rounded["scores"]
    ]
    for query in rounded["queries"]:
        query["responses"] |= {f"{k} int4": v for k, v in query["responses"].items()}
    for row in document["scores"]:
        row["sampled_recall"] = 60.0 if row["model"] == student["label"] else None
    sources.evaluations.append(("rounded.json", rounded))
    sources.stress_tests = {
        "relearning": [
            (
                "relearn.json",
                {
                    "config": {"models": models, "prefix": "Forget it."},
                    "relearning": [
                        {**curve, "lesson": "facts", "learning_rate": rate}
                        for rate, curve in (
                            (1e-3, {"model": "s", "looks": [look(0, 99), look(9, 20)]}),
                            (1e-4, {"model": "s", "looks": [look(0, 99), look(9, 40)]}),
                            (1e-4, {"model": "b + prefix", "looks": [look(0, 0), look(9, 80)]}),
                        )
                    ],
                },
            )
        ],
        "membership": [
            (
                "membership.json",
                {
                    "config": {"models": models},
                    "scores": {"loss": ""},
                    "membership": [
                        {
                            **{"model": "s", "score": "loss", "auc": 0.75, "low": 0.5, "high": 1},
                            **{"count": 3, "against": 3},
                        }
                    ],
                },
            )
        ],
    }
    content = make_content(sources)
    overview = content["evaluations"][0]["overview"]
    assert overview["columns"] == [
        *("asked plainly", "best of 8 samples", "worst attack", "int4", "fine-tuned on facts"),
    ]
    first, prefixed, last = overview["rows"]
    assert first["cells"][3:] == [7.0, None]
    assert prefixed["cells"][4] == 80
    assert last["cells"][1:] == [60.0, student["worst_forget_recall"], 7.0, 40]
    assert [row["membership"] for row in overview["rows"]] == [None, None, 0.75]
    assert "quantized weights" not in content["evaluations"][0]["not_tested"]
    (verdict,) = content["evaluations"][0]["verdicts"]
    assert verdict["text"].endswith("Fine-tuned on facts it gives 40.0 of what that did not teach.")
    # What the first evaluation judged under attack, the second does not judge without.
    assert [[v["model"] for v in e["verdicts"]] for e in content["evaluations"]] == [
        [student["label"]],
        [f"{student['label']} int4"],
    ]
    assert render_html(content).count("at a glance") == 1
    assert "| base + prefix |" in render_markdown(content)
    # An evaluation may lie in the folder of its student, too.
    inside = folder / "student" / "eval.json"
    shutil.copyfile(next(folder.glob("*.json")), inside)
    found = find_sources([folder / "student", inside, folder / "student"], summarize)
    assert len(found.evaluations) == 1
    inside.unlink()
    # The report's own document, beside what it was made from, is none of its sources.
    path = folder / "report.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "relearning" not in find_sources([folder], summarize).stress_tests
    path.unlink()


def test_a_damaged_document_is_one_line(tmp_path: Path, sources: Sources) -> None:
    document = copy.deepcopy(sources.evaluations[0][1])
    del document["scores"][0]["intervals"]
    (tmp_path / "eval.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"eval\.json: damaged, KeyError at 'intervals'"):
        make_content(find_sources([tmp_path / "eval.json"], summarize))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="neither an evaluation"):
        find_sources([tmp_path / "other.json"], summarize)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no evaluation, student or cache there"):
        find_sources([tmp_path / "empty"], summarize)


def test_another_machines_document_and_strange_files_end_no_report(
    folder: Path,
    sources: Sources,
    tiny_cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    cut = Path(shutil.copytree(tiny_cache, folder / "cut"))
    next((cut / "shards").iterdir()).unlink()
    (folder / "half.json").write_text('{"scores": [')
    (folder / "old.json").write_text(json.dumps({**sources.evaluations[0][1], "format": 1}))
    (folder / "later.json").write_text(json.dumps({"format": 99, "membership": []}))
    document = copy.deepcopy(sources.evaluations[0][1])
    document["models"][0]["model"] = "~nobody-of-that-name/base"
    (folder / "eval.json").write_text(json.dumps(document))
    (folder / "dangling.json").symlink_to(folder / "nowhere.json")
    (folder / "inside.json").mkdir()
    found = find_sources([folder], summarize)
    (evaluation,) = make_content(found)["evaluations"]
    assert evaluation["models"][0]["model"] == "base"
    left_out = [line for line in caplog.messages if line.endswith("; left out")]
    assert len(left_out) == 4
    for name in ("cut", "half.json", "old.json", "later.json"):
        assert any(name in line for line in left_out)
        with pytest.raises((CacheError, DataError)):
            find_sources([folder / name], summarize)
    with pytest.raises(DataError, match=r"later\.json: a stress test of format 99, expected 1"):
        find_sources([folder / "later.json"], summarize)
    with pytest.raises(DataError, match="cannot be read"):
        find_sources([folder / "dangling.json"], summarize)


def test_a_file_of_wordings_is_published_by_its_name(sources: Sources) -> None:
    document = sources.evaluations[0][1]
    document["attacks"][0]["text"] = "/home/me/asked.jsonl"
    document["attacks"][1]["text"] = "/think {query}"
    document["sets"][0]["source"] = "/home/me/forget.jsonl"
    content = make_content(sources)
    assert "/home/me" not in json.dumps(content)
    families = content["evaluations"][0]["families"]
    texts = {attack["text"] for family in families for attack in family["attacks"]}
    assert {"asked.jsonl", "/think {query}"} < texts


def test_what_is_published_tells_no_path(sources: Sources, folder: Path) -> None:
    page = render_html(make_content(sources))
    assert str(folder) not in page
    assert published_value({"a": ["/root/x/model", "hf://u:p@h/x"]}) == {"a": ["model", "hf://h/x"]}


def test_a_chart_places_its_points_between_its_axes() -> None:
    logarithmic = lay_out({"log": True, "series": {"a": [[0, 1.0], [10, 0.01], [20, None]]}})
    assert logarithmic is not None
    corners = [(56.0, 12.0, "0: 1"), (548.0, 222.0, "10: 0.01")]
    assert logarithmic["lines"] == [corners]
    assert [text for _, text in logarithmic["rows"]] == ["0.01", "0.1", "1"]
    no_logarithm = {"log": True, "series": {"a": [[30, 0.0]]}}
    assert lay_out(no_logarithm) is None
    flat = lay_out({"log": False, "series": {"a": [[5, 0.0]]}})
    assert flat is not None
    assert flat["lines"] == [[(302.0, 117.0, "5: 0")]]


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors_or_overflow(
    sources: Sources, tmp_path: Path, width: int
) -> None:
    _add_stress_tests(sources)
    page = render_html(make_content(sources, compare_first_tokens(sources, 1)))
    probe = """<script>
      const wide = [...document.querySelectorAll("main *")].filter(
        e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll"));
      document.querySelector("[data-each]").click();
      document.querySelector("th:nth-child(2) button").click();
      const option = document.querySelector("[data-f=attack]"); option.value = "*";
      option.dispatchEvent(new Event("input"));
      parent.postMessage(JSON.stringify({ wide: wide.map(e => e.outerHTML.slice(0, 80)),
        over: document.documentElement.scrollWidth > innerWidth, width: innerWidth,
        shown: document.querySelectorAll(".answer").length,
        sorted: document.querySelector("th:nth-child(2)").getAttribute("aria-sort") }), "*");
    </script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    # A frame, because a window of Chromium is never narrower than 500.
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<title></title><script>addEventListener('message', e => document.title = e.data)</script>"
        f"<iframe src=page.html width={width} height=900 style='border:0'></iframe>"
    )
    flags = ["--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    flags += ["--virtual-time-budget=20000", "--window-size=1400,1000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking"]
    result = subprocess.run(
        [str(BROWSER), "--headless", *flags, outer.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in result.stderr, result.stderr
    title = re.search(r"<title>(.*?)</title>", result.stdout)
    assert title is not None
    assert json.loads(title[1]) == {
        "wide": [],
        "over": False,
        "width": width,
        "shown": 24,
        "sorted": "descending",
    }
