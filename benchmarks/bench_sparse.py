"""What keeping few of the teacher's tokens costs: bytes a position, and the bias of the loss.

    python benchmarks/bench_sparse.py [--queries 120]

The demo world's model answers queries by sampling at temperature 2, and a cache is built for each
way of keeping tokens. The student is the same model with noise on its weights. Along the cached
answers, what a loss gives on the kept tokens is compared with the divergence over whole
distributions: in nats a position, and as the distance of the gradients by the student's logits, in
parts of the whole one's norm.

A second table is of tokens that are drawn, which no cache holds: ids of the teacher's whole
distribution and how often each came up ("Sparse Logit Sampling", Anshumann et al., arXiv
2503.16870), or the strongest tokens as they are and ids of what is left. Both estimate every
probability without bias. Bias is that of the mean over 32 draws, so that a sixth of the noise stays
in it; noise is how far a single draw is off, as a root mean square. Bytes are those of a Parquet
file with the columns that such a cache would need, in the format's encodings.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Tokens of a position that are drawn, with replacement, beside some that are not."""

    draws: int
    exact: int = 0
    """How many of the strongest are kept as they are; what is drawn is of all others."""


DRAWN = {
    "12 draws": Drawn(draws=12),
    "50 draws": Drawn(draws=50),
    "100 draws": Drawn(draws=100),
    "200 draws": Drawn(draws=200),
    "1000 draws": Drawn(draws=1000),
    "10 strongest, 10 draws": Drawn(exact=10, draws=10),
    "10 strongest, 25 draws": Drawn(exact=10, draws=25),
    "10 strongest, 40 draws": Drawn(exact=10, draws=40),
}
SEEDS = range(32)
LOSSES = ("kl", "kl-tail")
SIGNAL = {"token_ids", "logits", "logsumexp", "counts", "times"}
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
            scores = scores_of(student_TV, ids, tail=loss.tail)
            found = loss(scores, logits, torch.tensor(row.logsumexp))
            found, own = with_gradient(found, student_TV)
            sums[name] += float((found - whole).sum())
            sums[f"{name} gradient"] += float((own - gradient).norm(dim=1).sum())
    return sums


def estimate(shares_TV: Tensor, drawn: Drawn, generator: torch.Generator) -> Tensor:
    """Return what one draw says of distributions; its mean over draws is them, `[T, V]`."""
    strongest = shares_TV.topk(drawn.exact).indices
    tail = shares_TV.scatter(-1, strongest, 0.0)
    each = tail.sum(dim=-1, keepdim=True) / drawn.draws
    ids = torch.multinomial(tail, drawn.draws, replacement=True, generator=generator)
    return (shares_TV - tail).scatter_add_(-1, ids, each.expand(ids.shape))


def drawn_bytes(rows: Iterable[tuple[Tensor, Tensor]], drawn: Drawn, scratch: Path) -> int:
    """Return the compressed bytes of estimates in Parquet.

    Args:
        rows: The teacher's logits and an estimate of each row, `[T, V]`.
        drawn: Of what kind the estimates are.
        scratch: Where to write a file.
    """
    columns: dict[str, list[Any]] = defaultdict(list)
    for logits_TV, estimate_TV in rows:
        shares_TV, logsumexp_T = logits_TV.softmax(dim=-1), logits_TV.logsumexp(dim=-1)
        strongest = logits_TV.topk(drawn.exact)
        tail = shares_TV.scatter(-1, strongest.indices, 0.0).sum(dim=-1, keepdim=True)
        times_TV = (estimate_TV / tail * drawn.draws).round().scatter(-1, strongest.indices, 0.0)
        # By falling counts, as strongest come first elsewhere; ties by rising id.
        times_TV, ids_TV = times_TV.sort(dim=-1, descending=True, stable=True)
        there = times_TV > 0
        ids = [
            torch.cat([first, others[kept]])
            for first, others, kept in zip(strongest.indices, ids_TV, there, strict=True)
        ]
        columns["token_ids"].append(torch.cat(ids).numpy().astype(np.int32))
        columns["logits"].append(strongest.values.flatten().numpy())
        columns["times"].append(times_TV[there].numpy().astype(np.uint16))
        columns["counts"].append(there.sum(dim=-1).numpy().astype(np.int32))
        columns["logsumexp"].append(logsumexp_T.numpy())
    if not drawn.exact:
        del columns["logits"], columns["logsumexp"]  # the counts of all draws are the shares
    path = scratch / "drawn.parquet"
    pq.write_table(
        pa.table(dict(columns)),
        path,
        compression="zstd",
        compression_level=6,
        data_page_size=1 << 24,
        use_dictionary=[f"{name}.list.element" for name in ("token_ids", "times", "counts")],
        use_byte_stream_split=[
            f"{name}.list.element" for name in ("logits", "logsumexp") if name in columns
        ],
    )
    return signal_bytes([path])


def measure_drawn(
    rows: list[tuple[Tensor, Tensor]], drawn: Drawn, scratch: Path
) -> dict[str, float]:
    """Return sums over positions, of the teacher's and the student's logits, `[T, V]` a row."""
    sums: dict[str, float] = defaultdict(float)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    first = []
    for teacher_TV, student_TV in rows:
        shares_TV = teacher_TV.softmax(dim=-1)
        ratio_TV = teacher_TV.log_softmax(dim=-1) - student_TV.log_softmax(dim=-1)
        drawn_STV = torch.stack([estimate(shares_TV, drawn, each) for each in generators])
        first.append((teacher_TV, drawn_STV[0]))
        # The gradient by the student's logits is its own shares less these.
        off_STV = drawn_STV - shares_TV
        loss_ST = (off_STV * ratio_TV).sum(dim=-1)
        sums["positions"] += len(shares_TV)
        sums["entries"] += float((drawn_STV > 0).sum()) / len(SEEDS)
        sums["bias"] += float(loss_ST.mean(dim=0).sum())
        sums["noise"] += float(loss_ST.square().mean(dim=0).sqrt().sum())
        sums["gradient"] += float((student_TV.softmax(dim=-1) - shares_TV).norm(dim=-1).sum())
        sums["gradient bias"] += float(off_STV.mean(dim=0).norm(dim=-1).sum())
        sums["gradient noise"] += float(off_STV.square().sum(dim=-1).mean(dim=0).sqrt().sum())
    sums["bytes"] = drawn_bytes(first, drawn, scratch)
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
                error = sums[f"{name} gradient"] / sums["gradient"]
                cells.append(f"{sums[name] / count:+.3f}, {error:.1%}")
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
        print_drawn(teacher, student, CacheReader.open(cache), Path(scratch))
    print(f"{count:.0f} positions; over whole distributions {sums['whole'] / count:.3f} nats")


def print_drawn(teacher: Any, student: Any, reader: CacheReader, scratch: Path) -> None:
    """Print the table of drawn tokens."""
    print("\n| drawn | tokens a position | bytes a position | a token | ", end="")
    print("loss: bias, noise | gradient: bias, noise |")
    print("| --- |" + " ---: |" * 5)
    rows = [(all_logits(teacher, row), all_logits(student, row)) for row in reader]
    for label, drawn in DRAWN.items():
        sums = measure_drawn(rows, drawn, scratch)
        count, entries, size = sums["positions"], sums["entries"], sums["bytes"]
        cells = [f"{entries / count:.1f}", f"{size / count:.0f}", f"{size / entries:.1f}"]
        cells.append(f"{sums['bias'] / count:+.3f}, {sums['noise'] / count:.3f}")
        errors = (sums[f"gradient {name}"] / sums["gradient"] for name in ("bias", "noise"))
        cells.append(", ".join(f"{error:.1%}" for error in errors))
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
