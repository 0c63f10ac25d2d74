"""Two real processes (gloo, started by torchrun) against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One start of torchrun serves all: whole runs, one of which a single process gets SIGTERM, and the
# same again to its end.
SCRIPT = """
import json, os, signal, sys
from duet_unlearn.cli.errors import configure_logging
from duet_unlearn.errors import StoppedError
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.run import run
from duet_unlearn.distill.training.trainer import DuetTrainer

configure_logging(verbose=False)
*whole, stopped = (RunConfig(**settings) for settings in json.loads(sys.argv[1]))
for config in whole:
    run(config)

plain, passes = DuetTrainer.compute_loss, []

def compute_loss(self, *args, **kwargs):
    passes.append(None)
    if len(passes) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(self, *args, **kwargs)

DuetTrainer.compute_loss = compute_loss
try:
    run(stopped)
except StoppedError as error:
    # In one write: the two share this output.
    os.write(1, f"rank {os.environ['RANK']} {error}\\n".encode())
DuetTrainer.compute_loss = plain
run(stopped)
"""


def torchrun(folder: Path, runs: list[dict]) -> subprocess.CompletedProcess:
    script = folder / "runs.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script), json.dumps(runs)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=600,
    )


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "duet_log.jsonl").read_text().splitlines()]


def largest_difference(first: Path, second: Path) -> float:
    from safetensors.torch import load_file

    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def settings(tiny_cache: Path, tiny_model: Path, write_queries, tmp_path: Path) -> dict:
    return {
        "cache": str(tiny_cache),
        "student": str(tiny_model),
        "epochs": 2,
        "batch_size": 8,  # 30 rows: the last step of an epoch is smaller
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "views": ("@remember=2", "@disregard"),
        "eval_steps": 4,
        "eval_forget": (str(write_queries("forget", 3)),),
        "eval_retain": (str(write_queries("retain", 4, "river")),),
        "eval_max_new_tokens": 4,
        "checkpoint_selection": "last",
        "save_steps": 0,
    }


def assert_same_run(alone, together: Path) -> None:
    """The loss curve within 1e-4, the weights within 1e-5, the same recalls and near losses."""
    lines = [line for line in log_of(together) if "loss" in line]
    assert len(lines) == alone.steps
    for one, other in zip(log_of(Path(alone.out)), log_of(together), strict=True):
        for name in one.keys() & {"loss", "loss_forget", "loss_retain", "learning_rate"}:
            assert other[name] == pytest.approx(one[name], abs=1e-4), (one["step"], name)
    assert largest_difference(Path(alone.out), together) < 1e-5
    told = json.loads((together / "duet_run.json").read_text())["result"]
    for one, other in zip(alone.evaluations, told["evaluations"], strict=True):
        assert other == pytest.approx(one, abs=1e-6 if "forget" in one else 1e-4)


def test_two_processes_do_what_one_does(train, settings, tmp_path):
    on_rows = {**settings, "eval_forget": (), "eval_retain": (), "eval_cache": settings["cache"]}
    del on_rows["eval_max_new_tokens"]
    on_rows["eval_limit"] = 29  # one process has a row more than the other
    runs = {"whole": settings, "rows": on_rows, "stopped": settings}
    done = torchrun(tmp_path, [{**run, "out": str(tmp_path / name)} for name, run in runs.items()])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(train("alone", **settings), tmp_path / "whole")
    assert_same_run(train("alone-rows", **on_rows), tmp_path / "rows")
    # Both stopped at the step in which one of them got the signal, and went on from there.
    stops = [line for line in done.stdout.splitlines() if line.startswith("rank")]
    assert sorted(line.split(";")[0] for line in stops) == [
        f"rank {rank} stopped and saved at step 5 of 8" for rank in (0, 1)
    ]
    assert largest_difference(tmp_path / "whole", tmp_path / "stopped") == 0
    assert sorted(p.name for p in tmp_path.iterdir() if "unfinished" in p.name) == []
