"""The demo with the real vLLM engine: what the README's table says holds, defaults only.

The numbers are points of ROUGE-L recall on held-out queries.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

RECALL = "rouge_l_recall"
FORGET, RETAIN, GENERAL = "forget", "retain", "general"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    code = "from duet_unlearn.cli.distill import main; main(prog_name='duet-distill')"
    result = subprocess.run(
        [sys.executable, "-c", code, "demo", "--out", str(out), "--engine", "vllm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (out / "stdout.txt").write_text(result.stdout)
    return out


@pytest.fixture(scope="module")
def report(demo: Path) -> dict[str, Any]:
    return json.loads((demo / "eval.json").read_text())  # type: ignore[no-any-return]


def recall(
    report: dict[str, Any],
    model: str,
    set_name: str,
    *,
    attack: str | None = None,
    kind: str | None = None,
) -> float:
    (row,) = (
        row
        for row in report["scores"]
        if (row["model"], row["set"], row["attack"], row["kind"]) == (model, set_name, attack, kind)
    )
    return float(row[RECALL])


def attacks(report: dict[str, Any]) -> list[str]:
    return [attack["name"] for attack in report["attacks"]]


def test_the_demo_leaves_what_it_promises(demo: Path) -> None:
    assert (demo / "cache" / "manifest.json").is_file()
    assert (demo / "student" / "model.safetensors").is_file()
    manifest = json.loads((demo / "cache" / "manifest.json").read_text())
    assert [engine["engine"] for engine in manifest["engines"]] == ["vllm"]
    printed = (demo / "stdout.txt").read_text()
    assert "What to try next" in printed
    assert "Performance Shift" in printed or "shift" in printed


def test_the_base_knows_everything(report: dict[str, Any]) -> None:
    assert recall(report, "base", FORGET) >= 95
    assert recall(report, "base", RETAIN) >= 95


def test_the_prefix_makes_the_teacher_forget_the_saga_alone(report: dict[str, Any]) -> None:
    assert recall(report, "base + prefix", FORGET) <= 8
    assert recall(report, "base + prefix", RETAIN) >= 95


def test_every_attack_breaks_the_prefix(report: dict[str, Any]) -> None:
    assert len(attacks(report)) >= 6
    for attack in attacks(report):
        assert recall(report, "base + prefix", FORGET, attack=attack) >= 80, attack


@pytest.mark.parametrize("kind", ["another wording", "another fact", "another character"])
def test_the_student_forgets_held_out_queries(report: dict[str, Any], kind: str) -> None:
    assert recall(report, "student", FORGET, kind=kind) <= 8


@pytest.mark.parametrize("set_name", [RETAIN, GENERAL])
def test_the_student_keeps_the_rest(report: dict[str, Any], set_name: str) -> None:
    assert abs(recall(report, "student", set_name) - recall(report, "base", set_name)) <= 2


def test_one_view_holds_against_attacks_it_has_never_seen(report: dict[str, Any]) -> None:
    for attack in attacks(report):
        assert recall(report, "student with view", FORGET, attack=attack) <= 10, attack


def test_one_view_keeps_the_rest_under_the_same_attacks(report: dict[str, Any]) -> None:
    for attack in attacks(report):
        kept = recall(report, "student with view", RETAIN, attack=attack)
        assert kept >= recall(report, "base", RETAIN, attack=attack) - 5, attack


def test_the_student_is_a_model_folder_like_any_other(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo / "student"
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    # Training is the only reader of the shards; no answers and no teacher came with them.
    assert (folder / "README.md").is_file()
    run = json.loads((folder / "duet_run.json").read_text())
    manifest = json.loads((demo / "cache" / "manifest.json").read_text())
    assert manifest["digest"] in json.dumps(run)


def test_vllm_loads_the_student(demo: Path) -> None:
    from duet_unlearn.teacher_cache.engines import open_engine
    from duet_unlearn.teacher_cache.engines.base import EngineConfig

    engine = open_engine(
        "vllm",
        EngineConfig(
            model=demo / "student",
            top_k=5,
            positions=1,
            eos_token_ids=(0,),
            compute_dtype="float32",
            max_prompt_tokens=16,
        ),
    )
    try:
        ((index, signal),) = list(engine.signals([(0, [1, 2, 3, 4])]))
    finally:
        engine.close()
    assert index == 0
    assert signal.token_ids.shape == (1, 5)
