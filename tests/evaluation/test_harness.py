"""lm-eval on the demo world's model and an adapter on it, by a task file of our own."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from duet_unlearn.cli.distill import main
from duet_unlearn.data import demo_world as world
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import load_queries
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run

DOCUMENTS = 12
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {documents}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def needs_harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval)")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A task that asks the demo world's own questions, the answer among those of two others."""
    queries = load_queries(str(world.RETAIN_HELDOUT), split="retain")[:DOCUMENTS]
    tokenizer = load_tokenizer(world.MODEL)
    renderer = PromptRenderer(tokenizer)
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "prompt": tokenizer.decode(renderer.student_ids(query.messages)),
            "choices": [queries[(i + k) % DOCUMENTS].answer for k in range(3)],
            "label": 0,
        }
        for i, query in enumerate(queries)
    ]
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = TASK.format(name="demo_choice", documents=documents, cache=tmp_path / "datasets")
    (folder / "demo_choice.yaml").write_text(text, encoding="utf-8")
    return folder


def invoke(*arguments: object) -> Result:
    files = ("--forget", world.FORGET_HELDOUT, "--retain", world.RETAIN_HELDOUT)
    words = ("eval", *arguments, *files, "--limit", DOCUMENTS, "--max-new-tokens", 2)
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_task_of_a_local_file_on_model_and_adapter(tasks: Path, tmp_path: Path) -> None:
    needs_harness()
    pytest.importorskip("peft")
    adapter = RunConfig(
        objective="gradient-difference",
        forget=(str(world.FORGET),),
        retain=(str(world.RETAIN),),
        student=str(world.MODEL),
        out=str(tmp_path / "adapter"),
        lora_rank=2,
        learning_rate=1.0,
        max_steps=2,
    )
    run(adapter)
    models = (f"base={world.MODEL}", f"student={adapter.out}")
    result = invoke(*models, "--lm-eval", "demo_choice", "--lm-eval-path", tasks, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    found = {label: scores["demo_choice"] for label, scores in document["lm_eval"].items()}
    assert found["base"]["samples"] == DOCUMENTS
    assert found["base"]["acc,none"] > 0.9
    assert found["student"]["acc,none"] < 0.7  # a rate of 1 wrecks what the adapter is merged into
    assert document["versions"]["lm-eval"]
    lines = result.stderr.splitlines()
    at = lines.index("lm-eval's tasks, as it scores them")
    assert ["base", f"{found['base']['acc,none']:.3f}"] in [line.split() for line in lines[at:]]
    assert not [line for line in lines if "it/s" in line]


def test_what_it_cannot_run_is_one_line(tasks: Path, tmp_path: Path) -> None:
    needs_harness()
    (tasks / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n",
        encoding="utf-8",
    )
    cases = [
        (("--lm-eval", "no_such_task"), "--lm-eval no_such_task: lm-eval cannot load it"),
        (("--lm-eval", "broken", "--lm-eval-path", tasks), "--lm-eval broken: lm-eval cannot load"),
        (("--lm-eval", "x", "--lm-eval-path", tmp_path / "gone"), "no such folder of task files"),
        (("--lm-eval-path", tasks), "give --lm-eval as well"),
    ]
    for options, expected in cases:
        result = invoke(world.MODEL, *options)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = invoke(world.MODEL, "--lm-eval", "mmlu")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert 'pip install "duet-unlearn[lm-eval]"' in result.stderr
