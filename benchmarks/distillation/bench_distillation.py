"""Ordinary distillation on the demo world: a student from noise, from a cache and from its teacher.

    python benchmarks/distillation/bench_distillation.py [--steps 50 100 200 400]

The demo world's model is the teacher of a student half as wide and half as deep that starts from
noise. Both see the training queries with their given answers, scored along the answers. The online
student's teacher runs in every step and gives whole distributions, the others' ran once and gave K
logits. All of them take the same rows in the same order. What is printed is the divergence from the
teacher, in nats a token, along the answers of held-out queries.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import PreTrainedModel as Model

from duet_unlearn.data import demo_world as world
from duet_unlearn.distill.batches.dataset import CacheDataset, collate
from duet_unlearn.distill.batches.sampler import PLAIN, Draw, sampler_of
from duet_unlearn.distill.config import RunConfig
from duet_unlearn.distill.losses import row_means
from duet_unlearn.distill.model.student import open_student
from duet_unlearn.distill.objectives.base import Objective, open_objective
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.reader import CacheReader

TRAIN = (world.FORGET, world.RETAIN, world.GENERAL)
HELD_OUT = (world.FORGET_HELDOUT, world.RETAIN_HELDOUT)
STUDENTS: dict[str, dict[str, Any]] = {
    "cache, kl-tail": {},
    "cache, kl-tail, --ce-weight 0.5": {"ce_weight": 0.5},
    "answers alone, --ce-weight 1": {"ce_weight": 1.0},
}
ONLINE = "online teacher"
BATCH, RATE = 16, 2e-3


def build_cache(out: Path, sources: tuple[Path, ...]) -> Path:
    """Score the answers of some files."""
    build(
        BuildConfig(
            teacher=str(world.MODEL),
            prefix=None,
            responses=tuple(map(str, sources)),
            out=out,
            engine="transformers",
            positions=64,
        )
    )
    return out


def log_shares(model: Model, batch: dict[str, Any]) -> Tensor:
    """Return log-probabilities of all tokens at the scored positions, `[B, T, V]`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    inputs["logits_to_keep"] = batch["position_mask"].shape[1]
    found: Tensor = model(**inputs).logits.log_softmax(dim=-1)
    return found


def divergences(teacher: Model, student: Model, batch: dict[str, Any]) -> Tensor:
    """Return each row's mean divergence over whole distributions, `[B]`."""
    with torch.no_grad():
        wanted = log_shares(teacher, batch)
    found = log_shares(student, batch)
    each = kl_div(found, wanted, log_target=True, reduction="none").sum(dim=-1)
    return row_means(each, batch["position_mask"])


def train(
    objective: Objective,
    config: RunConfig,
    student: Model,
    losses: Callable[[dict[str, Any]], Tensor],
    steps: int,
) -> Iterator[int]:
    """Train, and yield the number of steps after each."""
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=float(config.learning_rate), weight_decay=0.0)
    sampler, done = sampler_of(objective.order, config), 0
    for epoch in range(steps):
        sampler.set_epoch(epoch)
        for draws in sampler:
            batch = objective.collate([objective.dataset[draw] for draw in draws])
            (losses(batch) * batch["weight"]).sum().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            yield done
            if done == steps:
                return


def main() -> None:
    """Train each student; print a row of the table as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 400])
    steps = parser.parse_args().steps
    teacher = AutoModelForCausalLM.from_pretrained(world.MODEL)
    small = AutoConfig.from_pretrained(
        world.MODEL, hidden_size=96, intermediate_size=256, num_hidden_layers=2, head_dim=16
    )
    print("| student | " + " | ".join(f"{step} steps" for step in steps) + " |")
    print("| --- |" + " ---: |" * len(steps))
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "train", TRAIN)
        asked = build_cache(Path(scratch) / "held-out", HELD_OUT)
        held_out = CacheDataset(CacheReader.open(asked))
        base = open_student(str(world.MODEL))
        for label in (*STUDENTS, ONLINE):
            config = RunConfig(
                cache=str(cache),
                student=str(world.MODEL),
                out="none",
                loss="kl-tail",
                batch_size=BATCH,
                learning_rate=RATE,
                **STUDENTS.get(label, {}),
            )
            objective = open_objective(config, base)
            torch.manual_seed(0)
            student = AutoModelForCausalLM.from_config(small)
            objective.attach(student)

            def losses(batch: dict[str, Any]) -> Tensor:
                if label == ONLINE:  # noqa: B023 - called within this turn of the loop
                    return divergences(teacher, student, batch)  # noqa: B023
                return objective.row_losses(student, batch)  # noqa: B023

            cells = [
                f"{measure(teacher, student, held_out):.3f}"
                for done in train(objective, config, student, losses, max(steps))
                if done in steps
            ]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


def measure(teacher: Model, student: Model, rows: CacheDataset) -> float:
    """Return the mean divergence of held-out rows."""
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            stop = min(start + 64, len(rows))
            batch = collate([rows[Draw(row, PLAIN, 0.0)] for row in range(start, stop)])
            found.append(divergences(teacher, student, batch))
    return float(torch.cat(found).mean())


if __name__ == "__main__":
    main()
