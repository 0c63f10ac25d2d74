"""What keeping few of the teacher's tokens costs: bytes a position, and the bias of the loss.

    python benchmarks/distillation/bench_sparse.py [--queries 120]

The demo world's model answers queries by sampling at temperature 2, and a cache is built for each
way of keeping tokens. The student is the same model with noise on its weights. Along the cached
answers, what a loss gives on the kept tokens, less what it gives the teacher itself, is compared
with the divergence over whole distributions: in nats a position, and as the distance of the
gradients by the student's logits, in parts of the whole one's norm.

With `--keep sampled` a cache holds what some draws from the whole distribution find. Their error is
noise: each position's points elsewhere, and the bias, a mean over positions, goes towards 0.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from duet_unlearn.data import demo_world as world
from duet_unlearn.distill.losses import Loss, kl, scores_of
from duet_unlearn.teacher_cache.build.build import build
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader

KEPT: dict[str, dict[str, Any]] = {
    "`--top-k 10`": {"top_k": 10},
    "`--top-k 50`": {"top_k": 50},
    "`--top-k 100`": {"top_k": 100},
    "`--top-k 100 --top-p 0.9`": {"top_k": 100, "top_p": 0.9},
    "`--top-k 100 --top-p 0.98`": {"top_k": 100, "top_p": 0.98},
    "the same, `--logit-dtype float16`": {"top_k": 100, "top_p": 0.98, "logit_dtype": "float16"},
    **{
        f"`--keep sampled --top-k {n}`": {"keep": "sampled", "top_k": n}
        for n in (12, 50, 200, 1000)
    },
}
LOSSES = ("kl", "kl-tail")
SIGNAL = {"token_ids", "logits", "logsumexp", "counts"}
TEMPERATURE, NOISE = 2.0, 0.5
"""Of the answers; and the student's noise, in standard deviations of the weights."""


def build_cache(out: Path, queries: Iterable[Path], settings: dict[str, Any]) -> CacheReader:
    """Cache sampled answers; the same tokens whatever is kept of them."""
    build(
        BuildConfig(
            teacher=str(world.MODEL),
            prefix=None,
            train=tuple(map(str, queries)),
            out=out,
            engine="transformers",
            positions=24,
            temperature=TEMPERATURE,
            **{"logit_dtype": "float32", **settings},
        )
    )
    return CacheReader.open(out)


def signal_bytes(paths: Iterable[Path]) -> int:
    """Return the compressed bytes of the columns of signals."""
    total = 0
    for footer in map(pq.read_metadata, paths):
        for group in map(footer.row_group, range(footer.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            total += sum(
                column.total_compressed_size
                for column in columns
                if column.path_in_schema.split(".")[0] in SIGNAL
            )
    return total


def all_logits(model: Any, row: CachedRow) -> Tensor:
    """Return a model's logits along a row, `[T, V]`."""
    ids = np.concatenate([row.prompt_ids, row.response_ids[:-1]]).astype(np.int64)
    with torch.no_grad():
        logits: Tensor = model(torch.from_numpy(ids)[None]).logits[0, len(row.prompt_ids) - 1 :]
    return logits


def with_gradient(found: Tensor, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss a position, `[T]`, and its gradients, `[T, V]`."""
    (gradient,) = torch.autograd.grad(found.sum(), logits_TV)
    return found.detach(), gradient


def measure(teacher: Any, student: Any, reader: CacheReader) -> dict[str, float]:
    """Return sums over positions; `entries` is of the tokens that were kept."""
    sums: dict[str, float] = defaultdict(float)
    for row in reader:
        teacher_TV = all_logits(teacher, row)
        student_TV = all_logits(student, row).requires_grad_()
        whole, gradient = with_gradient(kl(student_TV, teacher_TV), student_TV)
        sums["positions"] += len(whole)
        sums["entries"] += int((row.logits > -np.inf).sum())
        sums["whole"] += float(whole.sum())
        sums["gradient"] += float(gradient.norm(dim=1).sum())
        ids, logits = torch.tensor(row.token_ids).long(), torch.tensor(row.logits)
        for name in LOSSES:
            loss = Loss(name=name)
            of_teacher, of_student = (
                loss(scores_of(side, ids, tail=loss.tail), logits, torch.tensor(row.logsumexp))
                for side in (teacher_TV, student_TV)
            )
            found, own = with_gradient(of_student - of_teacher, student_TV)
            sums[name] += float((found - whole).sum())
            sums[f"{name} gradient"] += float((own - gradient).norm(dim=1).sum())
    return sums


def main() -> None:
    """Print a row of the tables for each way of keeping tokens."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=120)
    lines = world.RETAIN.read_text().splitlines()[: parser.parse_args().queries]
    teacher = AutoModelForCausalLM.from_pretrained(world.MODEL)
    student = AutoModelForCausalLM.from_pretrained(world.MODEL)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight += NOISE * weight.std() * torch.randn_like(weight)
    print("| kept | tokens a position | bytes a position | a token | ", end="")
    print("`kl`: bias, error | `kl-tail`: bias, error |")
    print("| --- |" + " ---: |" * 5)
    with tempfile.TemporaryDirectory() as scratch:
        queries = Path(scratch) / "queries.jsonl"
        queries.write_text("\n".join(lines) + "\n")
        for number, (label, settings) in enumerate(KEPT.items()):
            cache = Path(scratch) / str(number)
            sums = measure(teacher, student, build_cache(cache, [queries], settings))
            count, size = sums["positions"], signal_bytes((cache / "shards").iterdir())
            cells = [f"{sums['entries'] / count:.1f}", f"{size / count:.0f}"]
            cells.append(f"{size / sums['entries']:.1f}")
            for name in LOSSES:
                if "keep" in settings and name == "kl":
                    cells.append("")  # not for shares whose rest is not known
                    continue
                error = sums[f"{name} gradient"] / sums["gradient"]
                cells.append(f"{sums[name] / count:+.3f}, {error:.1%}")
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
    print(f"{count:.0f} positions; over whole distributions {sums['whole'] / count:.3f} nats")


if __name__ == "__main__":
    main()
