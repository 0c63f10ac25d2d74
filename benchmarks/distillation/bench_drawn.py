"""Drawn tokens against the strongest ones: what a student learns from as many bytes.

    python benchmarks/distillation/bench_drawn.py [--steps 40 80] [--seeds 3]

The demo world's model is the teacher along answers that it samples at temperature 2, some to each
training query. The student is the same model with noise on its weights. It sees the same rows in
the same order each time, and of the teacher's distributions all, the strongest tokens, or those
that were drawn once, the same in every epoch. What is printed is the divergence from the teacher
over whole distributions, in nats a token along sampled answers to held-out queries: the mean over
seeds, of which each has its own student and order.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_distillation import BATCH, HELD_OUT, TRAIN, log_shares, measure, train
from bench_sparse import NOISE, all_logits, build_cache, signal_bytes
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel as Model

from duet_unlearn.data import demo_world as world
from duet_unlearn.distill.batches.dataset import CacheDataset
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.losses import row_means
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives.base import open_objective

SAMPLES, RATE = 4, 3e-4
SHARD_ROWS = 40
"""One row group a shard whatever K is: then an epoch has the same order, and seeds are paired."""
KEPT: dict[str, dict[str, Any]] = {
    "`--top-k 100`, `kl-tail`": {"top_k": 100},
    "`--top-k 100 --top-p 0.98`, `kl-tail`": {"top_k": 100, "top_p": 0.98},
    **{f"`--keep sampled --top-k {n}`": {"top_k": n, "keep": "sampled"} for n in (50, 200, 1000)},
}
WHOLE = "whole distributions"


def noised(seed: int) -> Model:
    """Return the teacher with noise on its weights."""
    student = AutoModelForCausalLM.from_pretrained(world.MODEL)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in student.parameters():
            weight += NOISE * weight.std() * torch.randn_like(weight)
    return student


def cross_entropies(student: Model, targets: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    """Return each row's mean cross-entropy with its `[T, V]` target, `[B]`."""
    found = log_shares(student, batch)
    wanted = torch.zeros_like(found)
    for row, name in enumerate(batch["names"]):
        wanted[row, : len(targets[name])] = targets[name]
    return row_means(-(wanted * found).sum(dim=-1), batch["position_mask"])


def learn(
    teacher: Model,
    cache: Path,
    targets: dict[str, Tensor] | None,
    held_out: CacheDataset,
    seed: int,
    steps: list[int],
) -> list[float]:
    """Train a student on a cache's signals, or on targets along its rows; return divergences."""
    config = RunConfig(
        cache=str(cache),
        student=str(world.MODEL),
        out="none",
        loss="kl-tail",
        batch_size=BATCH,
        learning_rate=RATE,
        seed=seed,
    )
    objective = open_objective(config, open_student(str(world.MODEL)))
    student = noised(seed)
    objective.attach(student)
    losses = partial(objective.row_losses, student)
    if targets is not None:
        losses = partial(cross_entropies, student, targets)
    return [
        measure(teacher, student, held_out)
        for done in train(objective, config, student, losses, max(steps))
        if done in steps
    ]


def main() -> None:
    """Train all students; print a row of the table for each way as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 80])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    steps, seeds = arguments.steps, range(arguments.seeds)
    teacher = AutoModelForCausalLM.from_pretrained(world.MODEL)
    titles = [*(f"{step} steps" for step in steps), "each seed's last"]
    print("| learned from | bytes a position | " + " | ".join(titles) + " |")
    print("| --- |" + " ---: |" * (len(titles) + 1))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        asked = build_cache(scratch / "held-out", HELD_OUT, {"top_k": 1})
        held_out = CacheDataset(asked)
        caches = {}
        for number, (label, settings) in enumerate(KEPT.items()):
            caches[label] = scratch / str(number)
            settings = {**settings, "samples": SAMPLES, "shard_rows": SHARD_ROWS}
            reader = build_cache(caches[label], TRAIN, settings)
        rows = {row.query_id: all_logits(teacher, row) for row in reader}
        positions = sum(map(len, rows.values()))
        whole = {name: row.softmax(dim=-1) for name, row in rows.items()}
        for label in (WHOLE, *KEPT):
            cache, targets = caches.get(label, reader.folder), None if label in KEPT else whole
            found = [learn(teacher, cache, targets, held_out, seed, steps) for seed in seeds]
            size = 4.0 * teacher.config.vocab_size
            if label in KEPT:
                size = signal_bytes((cache / "shards").iterdir()) / positions
            students = torch.tensor(found)
            cells = [f"{size:.0f}", *(f"{each:.4f}" for each in students.mean(dim=0))]
            cells.append(", ".join(f"{each:.4f}" for each in students[:, -1]))
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
    print(f"{positions} positions")


if __name__ == "__main__":
    main()
